"""The text half of the CLIP model that a vision tower is from, for methods that compare patches with the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import CallError, UnsupportedModelError
from vlmattn.methods.views import Paired
from vlmattn.plan import Plan


class TextTower:
    """Questions and patches in the space of one CLIP model; vision-language checkpoints hold only its vision tower.

    Args:
        clip: the `CLIPModel` whose vision tower the wrapped model has, such as openai/clip-vit-large-patch14-336.
        tokenizer: of that model.

    Raises:
        UnsupportedModelError: `clip` lacks one of a CLIP model's two towers or their projections.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        parts = ("text_model", "text_projection", "vision_model", "visual_projection")
        missing = [name for name in parts if not hasattr(clip, name)]
        if missing:
            raise UnsupportedModelError(
                f"{type(clip).__name__} has no {', '.join(missing)}: give the whole CLIPModel of the vision tower"
            )
        self.clip: Any = clip
        self.tokenizer = tokenizer

    def check(self, tower: nn.Module) -> None:
        """Refuse a vision tower that cannot be this model's.

        Raises:
            UnsupportedModelError: its weights have other shapes.
        """
        own, other = ({n: p.shape for n, p in x.named_parameters()} for x in (self.clip.vision_model, tower))
        if own != other:
            raise UnsupportedModelError(
                f"the text tower is that of another vision tower than this model's {type(tower).__name__}: give the "
                "CLIPModel that it was taken from"
            )

    def pair(self, questions: Sequence[str], rows: int | None = None) -> Paired:
        """The questions in the common space, cut into segments that the text tower can read.

        Args:
            questions: each is embedded once.
            rows: of the batch, of which each question takes equally many in a row (beams); None: one each.

        Raises:
            CallError: the rows cannot be shared out.
        """
        copies, over = divmod(rows or len(questions), len(questions))
        if over:
            raise CallError(f"{len(questions)} questions were given for a batch of {rows} rows: give one a sample")
        different = list(dict.fromkeys(questions))
        index = torch.tensor([different.index(question) for question in questions])
        return self._embed(different).rows(index.repeat_interleave(copies))

    @torch.no_grad()
    def _embed(self, questions: Sequence[str]) -> Paired:
        room = self.clip.config.text_config.max_position_embeddings
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        segments = [self._segments(question, room - 2) for question in questions]
        flat = [[start, *segment, end] for row in segments for segment in row]
        ids = torch.tensor([row + [end] * (room - len(row)) for row in flat])
        real = torch.tensor([[1] * len(row) + [0] * (room - len(row)) for row in flat])
        weight = self.clip.text_projection.weight
        states = self.clip.text_model(input_ids=ids.to(weight.device), attention_mask=real.to(weight.device))
        pooled = self.clip.text_projection(states.pooler_output).split([len(row) for row in segments])
        last = self.clip.text_projection(states.last_hidden_state[:, -1]).split([len(row) for row in segments])
        there = [torch.ones(len(row), dtype=torch.bool, device=weight.device) for row in segments]
        return Paired(
            text=nn.utils.rnn.pad_sequence(list(pooled), batch_first=True),
            segments=nn.utils.rnn.pad_sequence(there, batch_first=True),
            last=torch.stack([row[0] for row in last]),
            patches=self.patches,
        )

    def _segments(self, question: str, room: int) -> list[list[int]]:
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        return [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]

    @torch.no_grad()
    def patches(self, states: Tensor, normed: bool) -> Tensor:
        """Vision-tower rows `(..., C)` in the common space `(..., P)`, behind the tower's last norm or without it."""
        weight = self.clip.visual_projection.weight
        states = states.to(weight)
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(states) if normed else states)


def read_questions(ids: Tensor, plan: Plan, tokenizer: Any) -> list[str]:
    """The text behind the last image of every row of `ids` `(B, N)`; all its text where nothing is behind."""
    end = plan.length - plan.ahead
    text, visual = (plan.real & ~plan.visual)[:, :end], (plan.visual & plan.real)[:, :end]
    after = text & (visual.flip(1).cumsum(1) == 0).flip(1)
    chosen = torch.where(after.any(1, keepdim=True), after, text).to(ids.device)
    rows = zip(ids[:, :end], chosen, strict=True)
    return [str(tokenizer.decode(row[flags].tolist(), skip_special_tokens=True)).strip() for row, flags in rows]
