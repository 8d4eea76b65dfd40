"""Ask the embedded model the same questions with all visual tokens and with a quarter of them, and say what that saved.

python examples/quickstart.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import vlmattn
from vlmattn import scenes


def ask(model: Any, processor: Any, inputs: Mapping[str, torch.Tensor]) -> str:
    """The model's greedy answer to prepared inputs."""
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(spec: str = "fastv(keep=0.25)", questions: int = 6) -> None:
    """Print `questions` questions with the label and both answers, then the report of the last one."""
    model, processor = scenes.load("scenes-llava")
    examples = scenes.benchmark(images=2)
    for row in examples.rows[:questions]:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=examples.image(row["image"]), text=prompt, return_tensors="pt")
        everything = ask(model, processor, inputs)
        with vlmattn.wrap(model, spec) as session:
            pruned = ask(model, processor, inputs)
            report = session.report()
        print(f"{row['text']}  label: {row['label']}  all tokens: {everything}  {spec}: {pruned}")
    print(report)


if __name__ == "__main__":
    main()
