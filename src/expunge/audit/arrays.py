"""What a verdict is made from: per-example measurements of each model, and what counts as the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from expunge.audit.attacks.relearn import RelearnPoint
from expunge.core.intervals import Floats
from expunge.core.settings import Settings


class Thresholds(Settings):
    """What counts as the same, as lost and as sure; written into every judgement."""

    margin: float = Field(0.25, gt=0, le=0.5, description="largest accepted difference towards the target, as a share of the gap")
    far_margin: float = Field(0.5, gt=0, description="largest accepted difference away from the target, as a share of the gap")
    margin_cap: float = Field(0.4, gt=0, le=0.5, description="what the margin may grow to where training noise is large")
    remembered: float = Field(0.1, gt=0, le=0.5, description="largest accepted excess share of answers still remembered")
    utility: float = Field(0.15, gt=0, lt=1, description="largest accepted loss of utility, relative")
    fluency: float = Field(0.2, gt=0, lt=1, description="largest accepted rise of the share of degenerate generations")
    alpha: float = Field(
        0.05, gt=0, le=0.2, description="error rate of a conviction over all checks of a kind, and of each acquittal"
    )
    seed_noise: float = Field(
        0.05, gt=0, le=0.5, description="training noise assumed until several retrained models show it, as a share of the gap"
    )
    informative: float = Field(4.0, ge=1, description="a quantity counts if the target stands out by so many standard errors")
    require_attacks: bool = Field(True, description="whether 'forgotten' needs at least one attack that acts on the weights")


@dataclass(frozen=True)
class Sample:
    """Per-example values with the independent unit of each."""

    values: Floats
    clusters: Sequence[str]


@dataclass(frozen=True)
class Attempt:
    """What an attack found of each forget example of one model.

    Attributes:
        title: for sentences.
        values: one per forget example (n); NaN where an example does not allow the attack.
        toward: +1 if values grow with knowledge, -1 if they fall.
        criterion: what it tests.
        convicts: whether a verdict compares it; otherwise it is shown.
        applies: whether the model allows the attack; where it does not, its values only serve others for comparison.
        certain: what was found beyond doubt, one sentence; no interval can acquit then. Empty: nothing was.
    """

    title: str
    values: Floats
    toward: int
    criterion: str = ""
    convicts: bool = True
    applies: bool = True
    certain: str = ""


@dataclass(frozen=True)
class Arrays:
    """Per-example measurements of one model; the same examples in the same order for every model.

    Attributes:
        label: for messages.
        ids, clusters: of the forget examples (n).
        nll: mean negative log-likelihood per answer, nats (n); empty where answers in words are all that was had of the models.
        told: share of each answer that the greedy answer tells, in [0, 1] (n), NaN where an answer has no words; then alone.
        refused: 1 for each forget prompt that something answers in the model's place, else 0 (n), with ``told`` alone.
        log_truth_ratio: log of P(wrong) / P(right paraphrase) (n), NaN where an example has none; lower means knowing more.
        extraction: extraction strength or exact memorisation in [0, 1] (n).
        membership: by attack, scores of the forget examples (n) and of the holdout examples (h), higher = less member-like.
        holdout_clusters: of the holdout examples (h).
        looks_seen: probability that each forget row was trained on, from its margin under many models (n).
        utility: by name, per-example utilities, higher is better (probability of retain answers, ROUGE, ...).
        model_utility: an aggregate utility, checked without an interval.
        degenerate: by set of prompts, 1 for each generation that is degenerate, else 0.
        relearn: curve of :func:`~expunge.audit.attacks.relearn.relearn`.
        quantised: by bits, ``nll`` after rounding the weights (n).
        attempts: by attack, what it found.
        read_out: loss of one half of the forget rows under a last layer fitted anew on the other half, with their clusters.
    """

    label: str
    ids: Sequence[str]
    clusters: Sequence[str]
    nll: Floats = field(default_factory=lambda: np.empty(0))
    told: Floats | None = None
    refused: Floats | None = None
    log_truth_ratio: Floats | None = None
    extraction: Floats | None = None
    membership: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)
    holdout_clusters: Sequence[str] = ()
    looks_seen: Floats | None = None
    utility: Mapping[str, Sample] = field(default_factory=dict)
    model_utility: float | None = None
    degenerate: Mapping[str, Sample] = field(default_factory=dict)
    relearn: Sequence[RelearnPoint] = ()
    quantised: Mapping[int, Floats] = field(default_factory=dict)
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    read_out: Sample | None = None


@dataclass(frozen=True)
class Case:
    """A subject, those it is compared with, and the thresholds."""

    subject: Arrays
    retrained: Sequence[Arrays]
    target: Arrays
    limits: Thresholds

    @property
    def everyone(self) -> list[Arrays]:
        """The subject, the retrained models and the target, in this order."""
        return [self.subject, *self.retrained, self.target]

    @property
    def in_words(self) -> bool:
        """Whether answers in words are all that was had of the models."""
        return self.target.told is not None
