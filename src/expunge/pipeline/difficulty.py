"""How hard a request is, looked at before anything is changed: what the target knows, what is repeated, which pairs are alike.

Everything comes from the target as it is: one forward pass of each forget record, of as many unseen records as there are (at
most 512), and of each answer that would take a forgotten one's place. The retain set is read as text only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from expunge.adapters.base import Example
from expunge.adapters.composite import Composite
from expunge.adapters.language import LanguageAdapter
from expunge.audit.arrays import Thresholds
from expunge.audit.contrast import Contrast, moderated_error, moderated_spread
from expunge.audit.displacement import Displacement, displacement
from expunge.audit.metrics.memorisation import extraction_strength
from expunge.audit.scores import Floats, TokenScores, score
from expunge.core.intervals import Interval
from expunge.core.ranking import auc_delong
from expunge.data.records import Record
from expunge.data.repeats import Repeats, repeats
from expunge.engine.goal import shuffled
from expunge.engine.options import Engine
from expunge.methods.alternatives import alternatives, kind_for
from expunge.pipeline.unlearn import Request

ALPHA = 0.05  #: how rare among unseen records a value must be for a record to count as known
LIMIT = 512  #: unseen records that are scored at most
REFERENCES = 3  #: retrained models that the audit is assumed to have

Source = Literal["holdout", "swapped", "none"]


@dataclass(frozen=True)
class RecordDifficulty:
    """One forget record under the target.

    Attributes:
        id, subject: of the record.
        loss: mean negative log-likelihood per answer token, in nats.
        strength: extraction strength, the share of the answer in its longest suffix that greedy decoding reproduces.
        rank_loss: share of unseen records whose loss is as low, the record itself counted: ``(1 + #{unseen <= loss}) / (1 + n)``.
        rank_strength: the same of an extraction strength as high.
        known: whether either is at most 0.05; ``None`` where there are too few unseen records for that.
        repeats: what the retain set says of it.
        displacement: CHES of the answer that would take the place and its own; none for plain text, and for composite models.
    """

    id: str
    subject: str
    loss: float
    strength: float
    rank_loss: float | None
    rank_strength: float | None
    known: bool | None
    repeats: Repeats | None
    displacement: Displacement | None


@dataclass(frozen=True)
class Power:
    """Whether an audit of this request could acquit a model that has forgotten.

    Attributes:
        subjects: independent units in the forget set.
        half_width: of the 90 % interval that is to be expected of the difference in loss from the retrained models, in nats.
        margin: what is accepted: a quarter of the gap, in nats.
        needed: subjects at which the interval fits into the margin; ``None`` if more subjects would not help, or no gap is seen.
        enough: whether it fits as it is.
    """

    subjects: int
    half_width: float
    margin: float
    needed: int | None
    enough: bool


@dataclass(frozen=True)
class Difficulty:
    """What was seen of a request.

    Attributes:
        records: one entry for each forget record, in order.
        source: what stands for text that the target has not seen: held-out records, or retain records with swapped answers.
        unseen: how many of these.
        loss_unseen: their mean loss; NaN without any.
        separation: area under the ROC curve by which the loss tells forget records from unseen ones; 1 where all losses of forget
            records are lower.
        power: of an audit.
        alternatives: where the answers of the pairs come from.
        retain, retain_subjects: sizes of the retain set.
        standing_twice: retain records that duplicate forget records as a whole.
        tokens: input tokens of the forget and of the retain set.
    """

    records: tuple[RecordDifficulty, ...]
    source: Source
    unseen: int
    loss_unseen: float
    separation: Interval | None
    power: Power | None
    alternatives: str
    retain: int
    retain_subjects: int
    standing_twice: int
    tokens: tuple[int, int]

    @property
    def loss(self) -> float:
        """Mean loss of the forget records."""
        return float(np.mean([r.loss for r in self.records]))

    @property
    def strength(self) -> float:
        """Mean extraction strength of the forget records."""
        return float(np.mean([r.strength for r in self.records]))

    @property
    def unknown(self) -> list[str]:
        """Ids of records of which there is nothing to forget."""
        return [r.id for r in self.records if r.known is False]

    @property
    def repeated(self) -> list[RecordDifficulty]:
        """Records whose answer, or most of it, stands in the retain set."""
        return [r for r in self.records if r.repeats is not None and r.repeats.mostly]

    @property
    def told(self) -> list[RecordDifficulty]:
        """Records that the retain set tells again: the answer beside the subject, or beside most of the prompt."""
        return [r for r in self.records if r.repeats is not None and r.repeats.told]

    @property
    def alike(self) -> list[str]:
        """Ids of pairs whose normalised CHES is not negative, the highest first."""
        held = [r.displacement for r in self.records if r.displacement is not None and r.displacement.normalised >= 0]
        return [d.id for d in sorted(held, key=lambda d: -d.normalised)]

    def json(self) -> dict[str, Any]:
        """A plain mapping; what is not known is null."""
        return {
            "records": [{**asdict(r), "loss": _number(r.loss)} for r in self.records],
            "total": {
                "records": len(self.records), "loss": _number(self.loss), "extraction_strength": _number(self.strength),
                "nothing_to_forget": self.unknown,
                "unseen": {"source": self.source, "records": self.unseen, "loss": _number(self.loss_unseen)},
                "separation": _interval(self.separation),
                "repeated_in_retain": len(self.repeated), "told_in_retain": len(self.told),
                "duplicates_in_retain": self.standing_twice,
                "pairs": {"alternatives": self.alternatives, "normalised_ches_not_negative": self.alike},
                "audit": asdict(self.power) if self.power is not None else None,
                "retain": {"records": self.retain, "subjects": self.retain_subjects, "tokens": self.tokens[1]},
                "forget_tokens": self.tokens[0],
            },
        }  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(found: Interval | None) -> dict[str, float | int | None] | None:
    if found is None:
        return None
    return {"auc": found.value, "low": found.low, "high": found.high, "level": found.level}


def diagnose(
    adapter: LanguageAdapter,
    request: Request,
    engine: Engine,
    *,
    examples: Sequence[Example],
    retain_tokens: int = 0,
    how: str = "auto",
    template: str | None = None,
) -> Difficulty:
    """Look at a request under the target that the adapter holds; nothing is changed.

    Args:
        adapter: holds the target model.
        request: checked data; retain and holdout may be missing.
        engine: tokens per batch, and the seed of what is drawn.
        examples: the encoded forget records, in order.
        retain_tokens: input tokens of the retain set.
        how: where the answers that would take the place of forgotten ones come from.
        template: their text, for ``how="template"``.

    Raises:
        InputError: there are no alternatives of that kind.
    """
    forget = request.forget.records
    own = score(adapter, examples, batch_tokens=engine.max_tokens)
    source, unseen = _unseen(request, engine.seed)
    other = score(adapter, [adapter.encode(r) for r in unseen], batch_tokens=engine.max_tokens) if unseen else None
    kind = kind_for("custom", how, forget)
    pairs = _pairs(adapter, request, examples, engine, kind=kind, template=template)
    kept = request.retain
    twice = repeats(forget, kept) if kept is not None else [None] * len(forget)
    losses, strengths = own.nll(), _strengths(own)
    by_loss = _ranks(losses, other.nll() if other else None)
    by_strength = _ranks(-strengths, -_strengths(other) if other else None)
    columns = zip(forget, losses.tolist(), strengths.tolist(), by_loss, by_strength, twice, pairs, strict=True)
    return Difficulty(
        records=tuple(
            RecordDifficulty(r.id, r.cluster, loss, strength, low, high, _known(low, high, len(unseen)), said, pair)
            for r, loss, strength, low, high, said, pair in columns
        ),
        source=source,
        unseen=len(unseen),
        loss_unseen=float(np.mean(other.nll())) if other else math.nan,
        separation=_separation(own, other),
        power=power(losses, own.clusters, other.nll(), other.clusters) if other and len(other) > 1 else None,
        alternatives=kind,
        retain=0 if kept is None else len(kept),
        retain_subjects=0 if kept is None else len(set(kept.clusters())),
        standing_twice=0 if kept is None else len({r.id for r in kept} & request.overlap.retain_ids),
        tokens=(sum(e.size for e in examples), retain_tokens),
    )


def _unseen(request: Request, seed: int) -> tuple[Source, list[Record]]:
    """What stands for text that the target has not seen, at most :data:`LIMIT` records."""
    if request.holdout is not None:
        rng = np.random.default_rng([seed, 8])
        chosen = rng.permutation(len(request.holdout))[:LIMIT]
        return "holdout", [request.holdout.records[int(i)] for i in chosen]
    made = shuffled(request.retain.records, seed, LIMIT) if request.retain is not None else []
    return ("swapped", made) if made else ("none", [])


def _strengths(scores: TokenScores) -> Floats:
    return scores.reduce(extraction_strength, "hit", end="exclude")


def _ranks(values: Floats, unseen: Floats | None) -> list[float | None]:
    """Share of unseen values that are at most each value, the value itself counted with both."""
    if unseen is None:
        return [None] * len(values)
    ordered = np.sort(unseen)
    return [float((1 + np.searchsorted(ordered, v, side="right")) / (1 + len(ordered))) for v in values]


def _known(loss: float | None, strength: float | None, unseen: int) -> bool | None:
    """Whether a record stands out among unseen ones; told from at least 19, below which nothing can be rare enough."""
    if loss is None or strength is None or 1 / (1 + unseen) > ALPHA:
        return None
    return min(loss, strength) <= ALPHA


def _separation(own: TokenScores, other: TokenScores | None) -> Interval | None:
    if other is None:
        return None
    return auc_delong(other.nll(), own.nll(), clusters=(other.clusters, own.clusters))


def _pairs(
    adapter: LanguageAdapter, request: Request, examples: Sequence[Example], engine: Engine, *, kind: str, template: str | None
) -> list[Displacement | None]:
    forget = request.forget.records
    if isinstance(adapter.model, Composite):
        return [None] * len(forget)  # its scores come from two networks, whose states are of different spaces
    asked = [i for i, r in enumerate(forget) if not r.is_text]  # plain text has no question that another answer would fit
    answers = alternatives([forget[i] for i in asked], kind, engine.seed, template=template) if asked else []
    preferred = [adapter.encode(forget[i], answer=a, suffix="#alternative") for i, a in zip(asked, answers, strict=True)]
    found = displacement(adapter, preferred, [examples[i] for i in asked], engine.max_tokens)
    out: list[Displacement | None] = [None] * len(forget)
    for i, pair in zip(asked, found, strict=True):
        out[i] = pair
    return out


def power(losses: Floats, clusters: Sequence[str], unseen: Floats, unseen_clusters: Sequence[str]) -> Power:
    """What an audit with three retrained models could tell of these records by their loss, if the model forgot perfectly.

    The audit asks whether the interval of the difference between the unlearned model and the retrained ones lies within a
    quarter of the gap between target and retrained models. Neither model exists yet, so two things are assumed: retrained
    models find the forget records as hard as the unseen ones; and the difference scatters over subjects as the losses of unseen
    subjects do. The second is on the safe side where both models are wrong about the same subjects.

    Args:
        losses, clusters: of the forget records under the target ``[E]``.
        unseen, unseen_clusters: of at least two unseen records under the target ``[U]``.
    """
    limits = Thresholds()
    gap = float(np.mean(unseen) - np.mean(losses))
    subjects, others = len(set(clusters)), len(set(unseen_clusters))
    error, _ = moderated_error(unseen, unseen_clusters)
    own_error = error * math.sqrt(others / subjects)
    spread, freedom = moderated_spread([0.0], limits.seed_noise * abs(gap))
    found = Contrast(0.0, gap, own_error, float(subjects + 2), spread, freedom, REFERENCES, len(losses), subjects)
    level = 1 - 2 * limits.alpha
    half, margin = found.interval(level)[1], limits.margin * max(gap, 0.0)
    if half <= margin or gap <= 0:
        return Power(subjects, half, margin, subjects if gap > 0 else None, gap > 0)
    kind, number = found.needed(margin, level)
    return Power(subjects, half, margin, number if kind == "subjects" else None, False)
