"""`python -m vlmattn.bench`: the bench without any library for commands or tables."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmattn.bench import QUICK, Settings
from vlmattn.errors import VlmattnError

OK, FAILED = 0, 1


def arguments() -> argparse.ArgumentParser:
    """The options."""
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m vlmattn.bench", description=__doc__)
    parser.add_argument("--layers", type=int, help=f"decoder layers (default {default.layers})")
    parser.add_argument("--dim", type=int, help=f"width, a multiple of 128 (default {default.dim})")
    parser.add_argument("--tokens", type=int, help=f"visual tokens (default {default.tokens})")
    parser.add_argument("--repeats", type=int, help=f"timed rounds (default {default.repeats})")
    parser.add_argument("--steps", type=int, help=f"generated tokens per round (default {default.steps})")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the record (default runs/bench)"
    )
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds: shows that it works")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 0 if done, 1 if a proof failed or the options do not fit."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = arguments().parse_args(given)
    chosen = {name: getattr(options, name) for name in ("layers", "dim", "tokens", "repeats", "steps", "threads")}
    settings = dataclasses.replace(
        QUICK if options.quick else Settings(),
        command=shlex.join(["python", "-m", "vlmattn.bench", *given]),
        **{name: value for name, value in chosen.items() if value is not None},
    )

    from vlmattn.bench import result
    from vlmattn.bench.run import run

    try:
        record = run(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except VlmattnError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    paths = result.write(record, options.out)
    print(result.markdown(record))
    print("written: " + ", ".join(map(str, paths)))
    return OK


if __name__ == "__main__":
    sys.exit(main())
