"""Offset unlearning: what a small model has unlearnt is taken from the scores of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.combination import Combination
from expunge.adapters.decoding import AssistantScores
from expunge.adapters.offset import pair_folder, saved_pair, small_model
from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, ScoreEdit, action

_NAME = "Offset unlearning"


@action
class Offset(Action):
    """``z = z_model + w (z_tuned - z_plain)``: the difference of two small models (Huang et al. 2024, arXiv 2404.11045).

    ``tuned`` is the run of the method ``offset``, which trains both as published, with the loss of the sum; it holds ``plain``
    too, and serves the model that it was trained beside. Or any pair: ``plain`` is a small model with the served one's
    vocabulary, ``tuned`` the same after unlearning. Each request has its own caches of both, so a token costs two more passes,
    of one row each. Temperature and sampling come after the sum. It is not known for which targets ``tuned`` was made: they
    come and go with the action as a whole.
    """

    name: ClassVar[str] = "offset"
    title: ClassVar[str] = _NAME
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.SCORES})

    tuned: str = Field(description="a run of the method offset; or the small model after unlearning, folder or name on the hub")
    plain: str = Field("", description="the small model before it; none: that of the run")
    weight: float | None = Field(None, description="w: of the difference; 0: the served model as it is; none: the run's, or 1")

    def prepare(self, material: Material) -> Doer:
        """Load both.

        Raises:
            InputError: one cannot be loaded, or has another tokenizer or vocabulary than the served model; the run was trained
                beside another model; or a run and a plain model are given, or neither.
        """
        served = material.model(_NAME)
        folder = pair_folder(self.tuned)
        if folder is None and not self.plain:
            said = f"{self.tuned!r} is no run of the method offset."
            raise InputError(said, "Give the small model before it too: plain=FOLDER.")
        if folder is not None and self.plain:
            raise InputError(f"{self.tuned!r} holds both small models.", "Leave plain out.")
        if folder is not None:
            tuned, plain, held = saved_pair(served, folder)
            return _Offsets(tuned, plain, held.weight if self.weight is None else self.weight)
        models = [small_model(served, source) for source in (self.tuned, self.plain)]
        return _Offsets(models[0], models[1], 1.0 if self.weight is None else self.weight)


class _Offsets(Doer):
    def __init__(self, tuned: Any, plain: Any, weight: float) -> None:
        self.tuned, self.plain, self.weight = tuned, plain, weight

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        return Orders(scores=self._edit())

    def _edit(self) -> ScoreEdit:
        """The offset of one request: what it has read stays with it."""
        tuned, plain = (AssistantScores(m, Combination()) for m in (self.tuned, self.plain))

        def edit(ids: Tensor, prompt: int, scores: Tensor) -> Tensor:
            whole = ids[None]
            gap = tuned.following(whole).float() - plain.following(whole).float()
            # What a setting of the generation has excluded stays so.
            return torch.where(scores.isneginf(), scores, scores + self.weight * gap[0].to(scores))

        return edit
