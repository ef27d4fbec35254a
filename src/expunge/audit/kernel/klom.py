"""KLoM: the divergence between the margins of unlearned and of retrained models, example by example.

Georgiev et al. 2024, *Attribute-to-Delete: Machine Unlearning via Datamodel Matching*, arXiv 2410.23232.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import Floats, matrix, same_examples
from expunge.core.errors import InputError

_CELLS = 1 << 22  # margins binned at a time


def klom(unlearned: ArrayLike, oracles: ArrayLike, *, bins: int = 20, clip: float = 100.0, floor: float = 1e-5) -> Floats:
    """``KLoM(x) = sum_b P_b log(P_b / Q_b)`` in nats, ``[examples]``; lower is better. P is of the unlearned models, Q of the
    oracles.

    Margins are clipped, then both samples are counted in equal bins over their joint range; the last bin includes its upper edge.
    Q is set to at least ``floor`` where P is positive, which bounds the value by ``log(1 / floor)`` (11.5 at 1e-5) from above and
    by about ``-bins * floor`` from below. Direction: unlearned || oracle, as in the paper. The public benchmark calls its
    function with both swapped and so reports the other direction.

    A perfect method does NOT get 0 but the value of oracles against other oracles (:func:`klom_floor`): about 1.7 with 32 + 32
    models. It falls with more models or fewer bins, so compare only values with equal numbers of both. Read it on forget, retain
    and validation examples: a method must be good on all three. 0 where all margins of an example are equal in both sets; NaN
    where one is.

    Args:
        unlearned: margins ``[models, examples]`` of the unlearned models.
        oracles: of models retrained without the forget set, as many as possible (100 in the paper).
        bins: number of bins.
        clip: margins are cut to [-clip, clip].
        floor: least share of an oracle bin.

    Raises:
        InputError: the examples differ, or a parameter is out of range.
    """
    p, q = matrix(unlearned, "margins (unlearned)"), matrix(oracles, "margins (oracles)")
    same_examples(p, q)
    if bins < 2 or not clip > 0 or not 0 < floor < 1:
        raise InputError(f"KLoM needs two bins, a positive clip and a floor in (0, 1); got {bins}, {clip} and {floor}.")
    step = max(1, _CELLS // (len(p) + len(q)))
    parts = [slice(at, at + step) for at in range(0, p.shape[1], step)]
    return np.concatenate([_block(np.clip(p[:, s], -clip, clip), np.clip(q[:, s], -clip, clip), bins, floor) for s in parts])


@dataclass(frozen=True)
class Klom:
    """KLoM over a set of examples, in nats; lower is better, down to the floor.

    Attributes:
        mean: over examples.
        p95: 95th percentile.
        models: unlearned models and oracles behind it.
    """

    mean: float
    p95: float
    models: tuple[int, int]


def klom_summary(unlearned: ArrayLike, oracles: ArrayLike, *, bins: int = 20) -> Klom:
    """Mean and 95th percentile of :func:`klom`, as the paper reports them for forget, retain and validation examples separately.

    Raises:
        InputError: the examples differ.
    """
    values = klom(unlearned, oracles, bins=bins)
    return Klom(float(values.mean()), float(np.quantile(values, 0.95)), (len(np.asarray(unlearned)), len(np.asarray(oracles))))


def klom_floor(oracles: ArrayLike, second: ArrayLike | None = None, *, bins: int = 20, seed: int = 0) -> Klom:
    """What a perfect method would get: oracles against independent oracles.

    With a second set it is their KLoM against the first, so give as many as there are unlearned models. Without one, random
    halves of the only set are compared, which OVERSTATES the floor of the full set, since it falls with the number of models;
    ``models`` says how many stand behind it.

    Args:
        oracles: margins ``[models, examples]``, those that :func:`klom` is computed with.
        second: of other retrained models.
        bins: as for :func:`klom`.
        seed: of the halves.

    Raises:
        InputError: the examples differ, or there are fewer than four models to halve.
    """
    if second is not None:
        return klom_summary(second, oracles, bins=bins)
    only = matrix(oracles, "margins (oracles)")
    if len(only) < 4:
        raise InputError(f"A floor from halves needs four oracles; got {len(only)}.", "Train more, or give a second set.")
    order = np.random.default_rng(seed).permutation(len(only))
    return klom_summary(only[order[: len(only) // 2]], only[order[len(only) // 2 :]], bins=bins)


def _block(p: Floats, q: Floats, bins: int, floor: float) -> Floats:
    joint = np.concatenate([p, q])
    low, span = joint.min(axis=0), np.ptp(joint, axis=0)
    broken = np.isnan(span)
    safe = np.where((span > 0) & ~broken, span, 1.0)
    shares = [_histogram(np.where(broken, 0.0, (s - low) / safe), bins) for s in (p, q)]
    first, second = shares
    ratio = np.where(first > 0, first, 1.0) / np.maximum(second, floor)
    values = np.where(first > 0, first * np.log(ratio), 0.0).sum(axis=1)
    return np.asarray(np.where(broken, np.nan, values), dtype=np.float64)


def _histogram(position: Floats, bins: int) -> Floats:
    """Shares ``[examples, bins]`` of positions in [0, 1]; 1 belongs to the last bin."""
    models, examples = position.shape
    index = np.minimum((position * bins).astype(np.int64), bins - 1) + bins * np.arange(examples)
    counts = np.bincount(index.ravel(), minlength=bins * examples).reshape(examples, bins)
    return np.asarray(counts / models, dtype=np.float64)
