"""Score-based membership attacks: was this text in the training data?

Every score is oriented HIGHER = LESS member-like (as a loss is), so with non-members first

    AUC = P(score(holdout) > score(forget)) + P(equal) / 2

is 1 for full memorisation, 0.5 for none, and below 0.5 for over-unlearning: text that looks stranger to the model than text it
never saw betrays that it was treated. MUSE's code counts the other way round; :func:`privleak` converts.
"""

from __future__ import annotations

import abc
import zlib as zlib_module
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from expunge.audit.evidence import Evidence, Values
from expunge.audit.gradients import gradient_norm
from expunge.audit.metrics.papers import CARLINI, GRADIENT, LOSS, MIN_K, MIN_K_PLUS_PLUS
from expunge.audit.metrics.probability import loss
from expunge.audit.scores import End, Floats
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.registry import Registry, origin_of
from expunge.core.settings import Settings
from expunge.engine.parts import Paper


def zlib_length(text: str) -> int:
    """Bytes of the zlib-compressed UTF-8 text (level 6), never 0."""
    return len(zlib_module.compress(text.encode("utf-8")))


def zlib(logp: ArrayLike, text: str) -> float:
    """Mean loss divided by the compressed size of the scored text: ``NLL / len(zlib(text))``.

    Args:
        logp: log-probabilities of the text's tokens ``[T]``.
        text: the scored span only, without its prompt.
    """
    return loss(logp) / zlib_length(text)


def reference(logp: ArrayLike, logp_reference: ArrayLike) -> float:
    """Difference of losses, ``NLL - NLL_reference``, under a model that has not seen the text (Carlini et al. 2021).

    Some implementations take the ratio; the difference is the log-likelihood ratio per token and has no pole.
    """
    return loss(logp) - loss(logp_reference)


def min_k(logp: ArrayLike, k: float = 0.4) -> float:
    """Minus the mean of the lowest ``n_k = max(1, floor(k T))`` log-probabilities (Min-K%, Shi et al. 2023).

    ``k = 0.4`` as in MUSE (0.2 in the paper). Without the maximum, as in MUSE's code, a text of one or two tokens gives NaN.

    Args:
        logp: log-probabilities of the text's tokens ``[T]``.
        k: share of tokens, in (0, 1].

    Raises:
        InputError: there is no token, or k is out of range.
    """
    return -_lowest(np.asarray(logp, dtype=np.float64), k)


def min_k_plus_plus(logp: ArrayLike, mean_logp: ArrayLike, std_logp: ArrayLike, k: float = 0.4) -> float:
    """Minus the mean of the lowest ``n_k`` standardised log-probabilities ``z_t = (l_t - mu_t) / sigma_t`` (Zhang et al. 2024).

    ``mu_t = sum_v p log p`` and ``sigma_t^2 = sum_v p (log p)^2 - mu_t^2`` over the whole vocabulary at that position. Where the
    distribution is a point (sigma below 1e-6) z is 0 if the token is that point.

    Args:
        logp, mean_logp, std_logp: of the text's tokens ``[T]``.
        k: share of tokens, in (0, 1].

    Raises:
        InputError: there is no token, or k is out of range.
    """
    values, mean, std = (np.asarray(a, dtype=np.float64) for a in (logp, mean_logp, std_logp))
    return -_lowest((values - mean) / np.maximum(std, 1e-6), k)


def _lowest(values: Floats, k: float) -> float:
    if values.size == 0:
        raise InputError("A text without tokens has no membership score; leave it out.")
    if not 0 < k <= 1:
        raise InputError(f"Parameter 'k' must be a float in (0, 1]; got {k}.")
    n = max(1, int(k * values.size))
    return float(np.partition(values, n - 1)[:n].mean())


class MembershipAttack(Settings, abc.ABC):
    """A score per record; its fields are its parameters."""

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[Paper]
    evaluate: ClassVar[Callable[..., Any]]  #: the pure function
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES})  #: what it needs of a modality
    lack_is_common: ClassVar[bool] = False  #: whether what :meth:`lacks` misses, it misses for every model of the audit

    @abc.abstractmethod
    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """The score of each record of a set; records without tokens are absent, they are not "most member-like"."""

    def lacks(self, evidence: Evidence, label: str) -> str:
        """What is missing for the attack to be run on a model, or nothing."""
        return ""

    def values(self, evidence: Evidence, label: str, name: str) -> Values:
        """:meth:`score`, computed once."""
        key = ("attack", self.name, self.model_dump_json(), label, evidence.subject(label).fingerprint, name)
        return evidence.memo(key, lambda: self.score(evidence, label, name))


MEMBERSHIP: Registry[type[MembershipAttack]] = Registry("membership attack", "expunge.audit.attacks", "expunge.membership")


def membership_attack(cls: type[MembershipAttack]) -> type[MembershipAttack]:
    """Class decorator: register a membership attack under its ``name``."""
    return MEMBERSHIP.add(cls.name, cls, origin_of(cls.__module__))


class _Scored(MembershipAttack):
    """An attack on the per-token record of each answer."""

    end: End = Field("include", description="whether the appended end token counts")

    def _reduce(self, evidence: Evidence, label: str, name: str, function: Callable[..., float], *fields: str) -> Values:
        scores = evidence.scores(label, name)
        counts = scores.counts - (scores.ends if self.end == "exclude" else 0)
        return Values(scores.reduce(function, *fields, end=self.end), counts > 0)


@membership_attack
class LossAttack(_Scored):
    """LOSS: members have a lower loss."""

    name: ClassVar[str] = "loss"
    title: ClassVar[str] = "LOSS"
    formula: ClassVar[str] = "NLL = -(1/T) sum_t l_t"
    paper: ClassVar[Paper] = LOSS
    evaluate = staticmethod(loss)

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Mean loss."""
        return self._reduce(evidence, label, name, loss, "logp")


@membership_attack
class ZlibAttack(_Scored):
    """Loss relative to how compressible the text is, so that dull texts do not look like members."""

    name: ClassVar[str] = "zlib"
    title: ClassVar[str] = "zlib"
    formula: ClassVar[str] = "NLL / len(zlib(text))"
    paper: ClassVar[Paper] = CARLINI
    evaluate = staticmethod(zlib)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT})

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Loss over compressed size of the answer."""
        found = self._reduce(evidence, label, name, loss, "logp")
        sizes = np.array([zlib_length(r.answer) for r in evidence.records(name)], dtype=np.float64)
        return Values(found.values / sizes, found.present)


@membership_attack
class MinK(_Scored):
    """Min-K%: members have few very improbable tokens. The end token is left out: it is improbable for no text."""

    name: ClassVar[str] = "min-k"
    title: ClassVar[str] = "Min-K%"
    formula: ClassVar[str] = "-(mean of the lowest max(1, floor(k T)) of l_t)"
    paper: ClassVar[Paper] = MIN_K
    evaluate = staticmethod(min_k)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT})

    k: float = Field(0.4, gt=0, le=1, description="share of tokens, the least probable ones")
    end: End = Field("exclude", description="whether the appended end token counts")

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Min-K% of each answer."""
        return self._reduce(evidence, label, name, lambda logp: min_k(logp, self.k), "logp")


@membership_attack
class MinKPlusPlus(_Scored):
    """Min-K%++: as Min-K%, with each token's log-probability standardised by the distribution it comes from."""

    name: ClassVar[str] = "min-k-plus-plus"
    title: ClassVar[str] = "Min-K%++"
    formula: ClassVar[str] = "-(mean of the lowest max(1, floor(k T)) of (l_t - mu_t) / sigma_t)"
    paper: ClassVar[Paper] = MIN_K_PLUS_PLUS
    evaluate = staticmethod(min_k_plus_plus)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS})

    k: float = Field(0.4, gt=0, le=1, description="share of tokens, the lowest ones")
    end: End = Field("exclude", description="whether the appended end token counts")

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Min-K%++ of each answer."""
        fields = ("logp", "mean_logp", "std_logp")
        return self._reduce(evidence, label, name, lambda logp, mean, std: min_k_plus_plus(logp, mean, std, self.k), *fields)


@membership_attack
class ReferenceAttack(_Scored):
    """Loss relative to a second model that did not train on the forget set.

    A base model (before any fine-tuning) if the audit has one, else the first retrained model that is not the audited one.
    """

    name: ClassVar[str] = "reference"
    title: ClassVar[str] = "Reference"
    formula: ClassVar[str] = "NLL - NLL_reference"
    paper: ClassVar[Paper] = CARLINI
    evaluate = staticmethod(reference)

    def other(self, evidence: Evidence, label: str) -> str:
        """Label of the second model, or nothing."""
        return next(iter([*evidence.labels("base", but=label), *evidence.labels("retrained", but=label)]), "")

    def lacks(self, evidence: Evidence, label: str) -> str:
        """A second model."""
        return "" if self.other(evidence, label) else "it needs a second model that never saw the forget set (base or retrained)"

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Difference of losses."""
        own = self._reduce(evidence, label, name, loss, "logp")
        second = self._reduce(evidence, self.other(evidence, label), name, loss, "logp")
        with np.errstate(invalid="ignore"):
            return Values(own.values - second.values, own.present)


@membership_attack
class GradientAttack(MembershipAttack):
    """Gradient norm of the loss over all parameters: small where training has been. Needs a backward pass, so it has a budget."""

    name: ClassVar[str] = "gradient-norm"
    title: ClassVar[str] = "Gradient norm"
    formula: ClassVar[str] = "sqrt(sum_p ||d NLL / d theta_p||^2)"
    paper: ClassVar[Paper] = GRADIENT
    evaluate = staticmethod(gradient_norm)

    examples: int = Field(40, ge=2, description="records per set at most, whole clusters")

    def lacks(self, evidence: Evidence, label: str) -> str:
        """Weights: a forest has none, and who only asks a model does not get them."""
        weights = Offer.ROWS not in evidence.offers or any(p.numel() for p in evidence.adapter(label).model.parameters())
        return "" if weights else "the model has no weights"

    def score(self, evidence: Evidence, label: str, name: str) -> Values:
        """Gradient norm of a sample of the set's records."""
        return evidence.gradient_norms(label, name, self.examples)
