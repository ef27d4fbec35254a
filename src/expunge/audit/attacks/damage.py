"""Damage to the weights of a copy: does a rougher model remember what the fine one was taught to hide?

Unlearning changes weights by little, so what removes small differences may remove the unlearning: rounding
(:mod:`~expunge.audit.attacks.quantise`), pruning, noise. Each attack here has several strengths; what counts is the loss of
the forget answers at the strength with the lowest mean, and retrained models have the same choice.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.audit.attacks.inside import Arrays, kept
from expunge.audit.attacks.quantise import merged, quantised, rounded_weights
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import PRUNING, QUANTISATION, SOK
from expunge.audit.metrics.registry import Range
from expunge.audit.scores import score
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.engine.parts import Paper

Share = Annotated[float, Field(gt=0, lt=1)]


class DamageAttack(Attack):
    """The loss of each forget answer under a damaged copy, at the strength that brings most back.

    A subclass lists its strengths and damages a copy.
    """

    criterion: ClassVar[Criterion] = Criterion.COMPRESSION
    access: ClassVar[Access] = Access.WEIGHTS
    copies: ClassVar[bool] = True
    toward: ClassVar[Literal[1, -1]] = -1
    range: ClassVar[Range] = (0.0, None)
    passes: ClassVar[str] = "1 forward pass for each strength"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES})

    @abc.abstractmethod
    def strengths(self) -> Sequence[float]:
        """How strong, one after the other."""

    @abc.abstractmethod
    def damaged(self, adapter: Adapter, strength: float, seed: int) -> Adapter:
        """A copy of the adapter, damaged.

        Raises:
            InputError: the model has no weight that could be.
        """

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing."""
        return ""

    def losses(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """Mean loss of each answer, ``losses`` ``[strengths, records]``; without rows where nothing can be damaged."""

        def make() -> Arrays:
            adapter, at = evidence.adapter(label), evidence.protocol
            examples = [adapter.encode(r) for r in evidence.records(name)]
            found = []
            try:
                for strength in self.strengths():
                    copy = self.damaged(adapter, strength, at.seed)
                    found.append(score(copy, examples, batch_tokens=at.batch_tokens).nll())
            except InputError as error:
                evidence.miss(f"{self.title} was not tried on {label!r}: {error.message}")
                return {"losses": np.zeros((0, len(examples)))}
            return {"losses": np.stack(found)}

        return kept(self, evidence, label, name, part="losses", make=make)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The losses at the strength with the lowest mean."""
        losses = self.losses(evidence, label, name)["losses"].astype(np.float64)
        if not len(losses):
            return Values(np.full(losses.shape[1], np.nan), np.zeros(losses.shape[1], dtype=np.bool_))
        means = np.where(np.isfinite(losses.mean(axis=1)), losses.mean(axis=1), np.inf)
        return Values(losses[int(np.argmin(means))], np.ones(losses.shape[1], dtype=np.bool_))


@attack
class Pruning(DamageAttack):
    """The smallest weights of every linear module are set to zero, a share of each.

    Magnitude pruning (Han et al. 2015), without training afterwards. Embeddings, norms and biases stay.
    """

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "Pruning of weights"
    formula: ClassVar[str] = "min over shares s of mean NLL(w . [|w| above the s-quantile of its matrix])"
    paper: ClassVar[Paper] = PRUNING

    shares: tuple[Share, ...] = Field((0.1, 0.2, 0.3, 0.5), min_length=1, description="shares of each matrix that become zero")

    def strengths(self) -> Sequence[float]:
        """The shares."""
        return self.shares

    def damaged(self, adapter: Adapter, strength: float, seed: int) -> Adapter:
        """A pruned copy; ``round(share n)`` weights of a matrix of n go."""
        out = merged(adapter.copy())
        with torch.no_grad():
            for weight, _ in rounded_weights(out.model, embeddings=False):
                count = round(strength * weight.numel())
                if count:
                    smallest = weight.abs().flatten().topk(count, largest=False).indices
                    weight.view(-1)[smallest] = 0.0
        return out


@attack
class WeightNoise(DamageAttack):
    """Gaussian noise on the weights of every linear module, as a share of the root mean square of its matrix."""

    name: ClassVar[str] = "weight-noise"
    title: ClassVar[str] = "Noise on the weights"
    formula: ClassVar[str] = "min over strengths s of mean NLL(w + s rms(w) e), e ~ N(0, 1)"
    paper: ClassVar[Paper] = SOK

    shares: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.02, 0.05, 0.1, 0.2), min_length=1, description="standard deviations, relative to the matrix's root mean square"
    )

    def strengths(self) -> Sequence[float]:
        """The standard deviations."""
        return self.shares

    def damaged(self, adapter: Adapter, strength: float, seed: int) -> Adapter:
        """A noisy copy; the noise depends on the seed and the place of the matrix alone, so all models get the same."""
        out = merged(adapter.copy())
        with torch.no_grad():
            for at, (weight, _) in enumerate(rounded_weights(out.model, embeddings=False)):
                own = torch.Generator().manual_seed(1_000_003 * seed + at)
                noise = torch.randn(weight.shape, generator=own).to(weight)
                weight.add_(noise, alpha=strength * float(weight.float().pow(2).mean().sqrt()))
        return out


@attack
class GroupedRounding(DamageAttack):
    """Weights rounded to few bits with one scale for each small group, as deployed 4-bit formats have it.

    An audit rounds whole rows by default; groups lose less and so keep more of what was hidden (Zhang et al. 2025). The steps
    are even, not those of NF4.
    """

    name: ClassVar[str] = "quantise-groups"
    title: ClassVar[str] = "Rounding in groups"
    formula: ClassVar[str] = "min over bits of mean NLL(weights rounded to nearest, one scale per group)"
    paper: ClassVar[Paper] = QUANTISATION

    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field((4, 3), min_length=1, description="bits of a weight")
    group: int = Field(64, ge=1, description="weights that share a scale")

    def strengths(self) -> Sequence[float]:
        """The bits."""
        return self.bits

    def damaged(self, adapter: Adapter, strength: float, seed: int) -> Adapter:
        """A rounded copy."""
        return quantised(adapter, int(strength), self.group)
