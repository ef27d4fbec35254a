"""Terms on whole distributions: distillation to an edited one (UNDIAL, CE-U), divergence from the reference, flat logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Example
from expunge.core.access import Of, Stream
from expunge.core.search import Search
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
    ignore index address the vocabulary there; we do not follow it. For the paper's variant that edits only nouns or entities,
    give these as spans and take ``targets=marked``. Bounded: at the minimum ``p(y) = p_ref(y) e^-beta / Z``; beta 0 keeps the
    model as it is.
    """

    name: ClassVar[str] = "undial"
    source: ClassVar[Of] = Of.REFERENCE

    beta: Annotated[float, Search(3.0, 30.0, log=True)] = Field(
        10.0, ge=0, description="by how much the true token's logit is lowered (paper: 3 to 30)"
    )

    @property
    def suppression(self) -> float:
        """Beta."""
        return self.beta


@term
class CEU(Edited):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224): the model's own distribution without the true token.

    The gradient on the true logit is ``p``, on any other ``p_v - p_v / (1 - p)``: bounded by 1, and zero once forgotten. It is
    UNDIAL with the model itself as reference and infinite beta. As published, the first answer token is left out, unless it
    is the only one (as in classification).
    """

    name: ClassVar[str] = "ceu"
    source: ClassVar[Of] = Of.CURRENT

    skip: int = Field(1, ge=0, description="leading targets of each answer that are left out, also of the count")

    def values(self, views: Views) -> Tensor:
        """Cross-entropy of each target, 0 where it is skipped, ``[N]``."""
        view = views.current(Stream.FORGET)
        skipped = (view.lengths() - 1).clamp(max=self.skip)[view.owner]
        return super().values(views).masked_fill(view.position < skipped, 0.0)

    def count(self, examples: Sequence[Example]) -> int:
        """Targets that are not skipped."""
        return sum(e.n_targets - min(self.skip, max(e.n_targets - 1, 0)) for e in examples)


class Divergence(Term):
    """``sign * T^2 * KL(softmax(z_teacher / T) || softmax(z / T))`` on one stream; the names differ in teacher, sign and stream.

    The factor keeps the size of the gradient independent of the temperature (Hinton et al. 2015, arXiv 1503.02531).
    """

    reads: ClassVar[Stream]
    teacher: ClassVar[Of] = Of.REFERENCE
    sign: ClassVar[float] = 1.0

    temperature: Annotated[float, Search(0.5, 8.0, log=True)] = Field(
        1.0, gt=0, description="by which both sets of logits are divided"
    )
    reduction: Literal["token", "sum"] = Field(
        "token", description="mean over all targets, or over examples of their sums (what torch calls batchmean)"
    )

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of both models."""
        return frozenset({(self.reads, Of.CURRENT, "logits"), (self.reads, self.teacher, "logits")})

    def values(self, views: Views) -> Tensor:
        """Signed divergence of each target, ``[N]``."""
        current = (views.current(self.reads).logits / self.temperature).log_softmax(-1)
        teacher = (views[self.reads, self.teacher].logits / self.temperature).log_softmax(-1)
        divergence = F.kl_div(current, teacher, reduction="none", log_target=True).sum(-1)
        return divergence * (self.sign * self.temperature**2)

    def count(self, examples: Sequence[Example]) -> int:
        """Targets for ``token``, examples for ``sum``."""
        return super().count(examples) if self.reduction == "token" else len(examples)


@term
class KL(Divergence):
    """Forward divergence ``KL(p_ref || p)`` on the supervised targets of the retain set.

    Zero with zero gradient at the reference; the gradient with respect to the logits is ``p - p_ref``. Common
    implementations sum it over all positions, prompt and padding included, and divide by their number: then the padding
    decides how strong the term is. Here it is the mean over supervised targets.
    """

    name: ClassVar[str] = "kl"
    reads: ClassVar[Stream] = Stream.RETAIN


@term
class KLAscent(Divergence):
    """The divergence from the reference is *raised* on the forget set, ``-KL(p_ref || p)``: SCRUB's max step.

    Kurmanji et al. 2023, arXiv 2302.09880. It has no lower bound, so it needs a schedule that stops it (``turns``).
    """

    name: ClassVar[str] = "kl-ascent"
    reads: ClassVar[Stream] = Stream.FORGET
    sign: ClassVar[float] = -1.0


@term
class IncompetentKL(Divergence):
    """Forget predictions go to those of a network that has learnt nothing, ``KL(p_bad || p)`` (Chundawat et al. 2023,
    arXiv 2205.08096).

    The official code divides by the number of classes as well; its learning rates assume that. Here it is the mean over rows.
    """

    name: ClassVar[str] = "incompetent-kl"
    reads: ClassVar[Stream] = Stream.FORGET
    teacher: ClassVar[Of] = Of.INCOMPETENT


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
