"""Offset unlearning: what a small model has unlearnt is taken from the scores of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.combination import Combination, different_vocabularies
from expunge.adapters.decoding import AssistantScores
from expunge.adapters.identity import describe_tokenizer
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Action, Doer, Hit, Hook, Material, Orders, ScoreEdit, action

_NAME = "Offset unlearning"


@action
class Offset(Action):
    """``z = z_model + w (z_tuned - z_plain)``: the difference of two small models (Huang et al. 2024, arXiv 2404.11045).

    ``plain`` is a small model with the served one's vocabulary, ``tuned`` the same after unlearning. The paper trains ``tuned``
    with the loss of the sum; any pair can be served. Each request has its own caches of both, so a token costs two more passes,
    of one row each. Temperature and sampling come after the sum. It is not known for which targets ``tuned`` was made: they
    come and go with the action as a whole.
    """

    name: ClassVar[str] = "offset"
    title: ClassVar[str] = _NAME
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.SCORES})

    tuned: str = Field(description="the small model after unlearning: a folder, or a name on the hub")
    plain: str = Field(description="the same before it")
    weight: float = Field(1.0, description="w: of the difference; 0: the served model as it is")

    def prepare(self, material: Material) -> Doer:
        """Load both.

        Raises:
            InputError: one cannot be loaded, or has another tokenizer or vocabulary than the served model.
        """
        from expunge.adapters.loading import load

        served = material.model(_NAME)
        device = next(served.model.parameters()).device
        models = []
        for source in (self.tuned, self.plain):
            small = load(source)
            _check(served, small, source)
            models.append(small.model.to(device).eval())
        return _Offsets(models[0], models[1], self.weight)


def _check(served: LanguageAdapter, small: LanguageAdapter, source: str) -> None:
    if describe_tokenizer(served.tokenizer) != describe_tokenizer(small.tokenizer):
        raise InputError(
            f"{source!r} has another tokenizer than the served model, so its scores are of other tokens.",
            "Use a small model of the same family.",
        )
    sizes = [int(a.model.get_input_embeddings().weight.shape[0]) for a in (served, small)]
    if sizes[0] != sizes[1]:
        raise different_vocabularies(*sizes)


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
