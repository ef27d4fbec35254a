"""Terms on whole distributions: distillation to an edited one (UNDIAL, CE-U), divergence from the reference, flat logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Example
from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term
from expunge.methods.terms.functions import cross_entropy_to, suppress_target


class Edited(Term):
    """Cross-entropy to a distribution in which the true class is pushed down: ``CE(softmax(z - strength * onehot(y)), p)``.

    ``source`` says whose logits ``z`` are edited: the frozen target's, or the current model's own (without gradient).
    """

    source: ClassVar[Of]

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    @property
    def suppression(self) -> float:
        """By how much the true class's logit is lowered."""
        return math.inf

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model and of the source."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits"), (Stream.FORGET, self.source, "logits")})

    def values(self, views: Views) -> Tensor:
        """Cross-entropy of each target, ``[N]``."""
        view = views.current(Stream.FORGET)
        target = suppress_target(views[Stream.FORGET, self.source].logits, view.targets, self.suppression)
        return cross_entropy_to(target, view.logits)


@term
class Undial(Edited):
    """UNDIAL, self-distillation with adjusted logits (Dong et al. 2024, arXiv 2402.10052).

    The mean is over supervised targets only. A widely used implementation averages over prompt and padding too and lets the
    ignore index address the vocabulary there; we do not follow it. The paper's variant that edits only nouns or entities is
    not included. Bounded: at the minimum ``p(y) = p_ref(y) e^-beta / Z``; beta 0 keeps the model as it is.
    """

    name: ClassVar[str] = "undial"
    source: ClassVar[Of] = Of.REFERENCE

    beta: float = Field(10.0, ge=0, description="by how much the true token's logit is lowered (paper: 3 to 30)")

    @property
    def suppression(self) -> float:
        """Beta."""
        return self.beta


@term
class CEU(Edited):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224): the model's own distribution without the true token.

    The gradient on the true logit is ``p``, on any other ``p_v - p_v / (1 - p)``: bounded by 1, and zero once forgotten. It is
    UNDIAL with the model itself as reference and infinite beta. As published, the first answer token is left out; where an
    example has a single target (classification), use skip=0.
    """

    name: ClassVar[str] = "ceu"
    source: ClassVar[Of] = Of.CURRENT

    skip: int = Field(1, ge=0, description="leading targets of each answer that are left out, also of the count")

    def values(self, views: Views) -> Tensor:
        """Cross-entropy of each target, 0 where it is skipped, ``[N]``."""
        position = views.current(Stream.FORGET).position
        return super().values(views).masked_fill(position < self.skip, 0.0)

    def count(self, examples: Sequence[Example]) -> int:
        """Targets that are not skipped."""
        return sum(max(0, e.n_targets - self.skip) for e in examples)


@term
class KL(Term):
    """Forward divergence ``KL(p_ref || p)`` on the supervised targets of the retain set.

    Zero with zero gradient at the reference; the gradient with respect to the logits is ``p - p_ref``. Common
    implementations sum it over all positions, prompt and padding included, and divide by their number: then the padding
    decides how strong the term is. Here it is the mean over supervised targets.
    """

    name: ClassVar[str] = "kl"

    @property
    def stream(self) -> Stream:
        """Retain examples."""
        return Stream.RETAIN

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of both models."""
        return frozenset({(Stream.RETAIN, Of.CURRENT, "logits"), (Stream.RETAIN, Of.REFERENCE, "logits")})

    def values(self, views: Views) -> Tensor:
        """Divergence of each target, ``[N]``."""
        current = views.current(Stream.RETAIN).logits.log_softmax(-1)
        reference = views.reference(Stream.RETAIN).logits.log_softmax(-1)
        return F.kl_div(current, reference, reduction="none", log_target=True).sum(-1)


@term
class FlatLogits(Term):
    """Squared logit margin ``(max_v z - mean_v z)^2`` of the forget targets: drives the distribution to uniform.

    The forget side of PDU (Entesari et al. 2025, arXiv 2506.05314). The margin is that of the prediction *of* a supervised
    target; a common implementation reads the position after it instead (its mask is not shifted).
    """

    name: ClassVar[str] = "pdu"

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """Squared margin of each target, ``[N]``."""
        logits = views.current(Stream.FORGET).logits
        return (logits.amax(-1) - logits.mean(-1)).square()
