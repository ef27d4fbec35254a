"""Signed log-likelihood: teaching the retain set, the forget set or other answers, and plain gradient ascent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Example
from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


class Likelihood(Term):
    """``sign * NLL`` of one stream: one implementation, whose names differ in sign and stream only.

    A value belongs to a target. ``reduction`` says over what the sum is averaged: ``token`` gives the token mean of the
    whole step (what transformers' ``model(...).loss`` is for one batch; long answers weigh more), ``sequence`` the mean over
    examples of their token means (as in Yao et al. 2023 and Jang et al. 2022), ``sum`` the mean over examples of their sums.
    """

    reads: ClassVar[Stream]
    sign: ClassVar[float] = 1.0

    reduction: Literal["token", "sequence", "sum"] = Field(
        "token", description="mean over all targets, over examples of their means, or over examples of their sums"
    )

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses under the current model."""
        return frozenset({(self.reads, Of.CURRENT, "losses")})

    def values(self, views: Views) -> Tensor:
        """Signed losses, divided by the example's length for ``sequence``, ``[N]``."""
        view = views.current(self.reads)
        losses = view.losses / view.lengths()[view.owner] if self.reduction == "sequence" else view.losses
        return losses * self.sign

    def count(self, examples: Sequence[Example]) -> int:
        """Targets for ``token``, examples otherwise."""
        return super().count(examples) if self.reduction == "token" else len(examples)


@term
class NLL(Likelihood):
    """Negative log-likelihood of the retain set: keep what was known."""

    name: ClassVar[str] = "nll"
    reads: ClassVar[Stream] = Stream.RETAIN


@term
class ForgetNLL(Likelihood):
    """Negative log-likelihood of the forget set: *teaches* it, for methods that take what was learnt away again (task
    vectors, assistants)."""

    name: ClassVar[str] = "forget-nll"
    reads: ClassVar[Stream] = Stream.FORGET
    reverse: ClassVar[bool] = True


@term
class AlternativeNLL(Likelihood):
    """Negative log-likelihood of other answers to the forget prompts: refusals (IDK), or answers of other records."""

    name: ClassVar[str] = "alternative-nll"
    reads: ClassVar[Stream] = Stream.ALTERNATIVE

    answers: int = Field(1, ge=1, le=64, description="other answers to each prompt, all of them read in every step")


@term
class GradientAscent(Likelihood):
    """Gradient ascent: the log-likelihood of the forget set is minimised, ``-NLL``. It has no lower bound."""

    name: ClassVar[str] = "gradascent"
    reads: ClassVar[Stream] = Stream.FORGET
    sign: ClassVar[float] = -1.0
