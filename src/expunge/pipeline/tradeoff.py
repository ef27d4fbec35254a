"""Where a trial stands: how far its forgetting is from that of unseen records, and how much usefulness it costs.

    distance = W(trial, unseen) / W(target, unseen)        lost = max over sets of max(0, u* - u) / |u*|

``W`` is the Wasserstein-1 distance of two samples of losses, in nats: of the records to forget under the trial's model (or the
target), and of records that a model has never seen: the same records under retrained models where there are any, else held-out
records under the target. It is 0 where both are alike, and 1 at the target; over-unlearning counts too. Since it compares whole
distributions, answers known by heart are not made up for by others that are pushed far away, as they would be in a mean.
``u*`` is the usefulness of the retrained models where there are any, else of the target.

Both are the sweep's own measures, for choosing on validation records; no verdict rests on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

from expunge.core.errors import InputError
from expunge.pipeline.validation import Measured

Floats = npt.NDArray[np.float64]
Rule = Literal["nearest", "balanced"]
_DRAWS = 200
_LEVEL = 0.9
_TELLING = 1e-3  #: nats between target and unseen records below which there is nothing to forget

RULES: Mapping[Rule, str] = {
    "nearest": "of the trials that lose at most the bound of usefulness, the one whose forgetting is nearest to unseen records",
    "balanced": "the trial with the smallest sqrt(distance^2 + lost^2)",
}


@dataclass(frozen=True)
class Reference:
    """What trials are compared with.

    Attributes:
        target: losses of the validation records to forget under the target, ``[n]``.
        unseen: losses of unseen records: a row for each retrained model, ``[models, n]``, or one of held-out records, ``[1, m]``.
        retrained: whether they are of retrained models, on the same records.
        utility: by set, what lost usefulness is counted from.
        clusters: subject of each validation record to forget.
        of: whose losses those of unseen records are, in words.
    """

    target: Floats
    unseen: Floats
    retrained: bool
    utility: Mapping[str, float]
    clusters: Sequence[str]
    of: str = ""

    def check(self) -> None:
        """Check that there is something to forget.

        Raises:
            InputError: the target cannot be told from unseen records.
        """
        gap = _between(self.target, self.unseen.reshape(-1))
        if not gap > _TELLING:
            raise InputError(
                f"The target's losses on the validation records are like those of unseen records ({gap:.2g} nats apart): nothing "
                "there could be forgotten, so no setting can be chosen.",
                "Sweep on records that the model knows better than unseen ones.",
            )


@dataclass(frozen=True)
class Place:
    """Where a trial stands.

    Attributes:
        distance: of its forgetting, see above.
        low, high: 90 % interval of the distance over subjects.
        lost: share of the usefulness that is lost, on the set where it is most.
    """

    distance: float
    low: float
    high: float
    lost: float


def place(found: Measured, reference: Reference) -> Place:
    """Where a model stands; its losses must be finite."""
    losses = np.array(found.losses, dtype=np.float64)
    gap = _between(reference.target, reference.unseen.reshape(-1))
    distance = _between(losses, reference.unseen.reshape(-1)) / gap
    low, high = _interval(losses, reference)
    lost = max((max(0.0, u - found.utility[name]) / abs(u) if u else 0.0 for name, u in reference.utility.items()), default=0.0)
    return Place(distance, min(low, distance), max(high, distance), lost)


def _between(a: Floats, b: Floats) -> float:
    return float(wasserstein_distance(a, b))


def _interval(losses: Floats, reference: Reference) -> tuple[float, float]:
    """Percentile interval over draws of subjects; retrained models are read on the same draw, held-out records stay."""
    names = sorted(set(reference.clusters))
    of = {name: np.flatnonzero([c == name for c in reference.clusters]) for name in names}
    rng = np.random.default_rng(5)
    found = []
    for _ in range(_DRAWS):
        drawn = np.concatenate([of[names[int(i)]] for i in rng.integers(0, len(names), len(names))])
        unseen = (reference.unseen[:, drawn] if reference.retrained else reference.unseen).reshape(-1)
        gap = _between(reference.target[drawn], unseen)
        if gap > 0:
            found.append(_between(losses[drawn], unseen) / gap)
    if not found:
        return math.inf, -math.inf
    low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def score(at: Place | None, rule: Rule, bound: float) -> float:
    """The smaller the better, in the order of the rule; a trial without a result is behind all others.

    Under "nearest", trials within the bound score in [0, 1), the others from 1 on by how far they are beyond it.
    """
    if at is None:
        return 1e6
    if rule == "balanced":
        return math.hypot(at.distance, at.lost)
    return at.distance / (1 + at.distance) if at.lost <= bound else 1 + at.lost - bound


def choose(places: Sequence[Place | None], rule: Rule, bound: float) -> int | None:
    """Index of the trial that the rule chooses; the first of equals. None where none is allowed."""
    allowed = [i for i, at in enumerate(places) if at is not None and (rule == "balanced" or at.lost <= bound)]
    if not allowed:
        return None

    def order(i: int) -> tuple[float, float, int]:
        at = places[i]
        assert at is not None
        return score(at, rule, bound), at.lost, i

    return min(allowed, key=order)


def front(places: Sequence[Place | None]) -> list[bool]:
    """Which trials no other beats: at least as good in distance and usefulness, and better in one."""
    known = [(at.distance, at.lost) for at in places if at is not None]
    return [
        at is not None
        and not any(d <= at.distance and lost <= at.lost and (d, lost) != (at.distance, at.lost) for d, lost in known)
        for at in places
    ]
