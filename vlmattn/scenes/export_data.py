"""Write a split as files: ``python -m vlmattn.scenes.export_data --split test --images 100 --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .splits import ALL_TASKS, SPLITS, TASKS, benchmark
from .world import WORLD_2, WORLDS


def main(arguments: list[str] | None = None) -> None:
    """Command line of :meth:`vlmattn.scenes.SceneSet.save`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.export_data",
        description="Write scenes as PNG files, existence questions in POPE's file form and the rest as JSON lines.",
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test")
    parser.add_argument("--images", type=int, default=100, help="pictures with at least one question (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="0 is the published set (default)")
    parser.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, metavar="TASK", default=TASKS, help=", ".join(ALL_TASKS)
    )
    parser.add_argument(
        "--world", choices=tuple(WORLDS), default=WORLD_2.name, help="version of the scenes (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    scenes = benchmark(options.split, options.tasks, options.images, options.seed, options.world)
    scenes.save(options.out)
    print(f"{len(scenes.names)} pictures, {len(scenes.rows)} questions, sha256 {scenes.sha256}")


if __name__ == "__main__":
    main()
