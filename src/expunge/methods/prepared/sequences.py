"""Orders in which the slices of a shard are learnt, so that deletions leave long chains for long."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from scipy import optimize

from expunge.core.errors import InputError

Chain = tuple[int, ...]  #: a permutation of the slices, counted from 0


def cyclic(slices: Sequence[int], count: int) -> list[Chain]:
    """``count`` different orders for deletions that are equally likely everywhere.

    Up to as many as there are slices they are rotations, so that every slice is first in one at most; beyond that each
    rotation keeps its first slice and the rest is rotated in the same way.

    Raises:
        InputError: there are not so many orders.
    """
    items = tuple(slices)
    if not 1 <= count <= math.factorial(len(items)):
        raise InputError(
            f"{len(items)} slices have {math.factorial(len(items))} orders; {count} were asked for.", "Choose fewer."
        )
    turned = [items[k:] + items[:k] for k in range(len(items))]
    if count <= len(items):
        return turned[:count]
    shares = [count // len(items) + (k < count % len(items)) for k in range(len(items))]
    return [(chain[0], *rest) for chain, share in zip(turned, shares, strict=True) for rest in cyclic(chain[1:], share)]


def score(chain: Sequence[int], probabilities: Sequence[float], deletions: int) -> float:
    """``sum_k k (1 - sum_{j <= k} p_j)^t``: the longer the parts that are likely to outlive t deletions, the higher.

    Source: Chowdhury et al. 2024 (arXiv 2406.16257), with the weights k of the paper (its code takes 1).
    """
    held, total = 0.0, 0.0
    for k, place in enumerate(chain, start=1):
        held += probabilities[place]
        total += k * max(0.0, 1.0 - held) ** deletions
    return total


def matched(probabilities: Sequence[float], count: int, deletions: int = 100) -> list[Chain]:
    """``count`` orders for known probabilities, at most as many as slices, the best first.

    Every slice begins a chain; in each round the chains are matched to their next slices, a different one for each, so that the
    sum of their scores is largest (the Hungarian method). There are as many rounds as slices, less one.

    Args:
        probabilities: that a deletion falls into each slice, with a sum of 1 at most.
        count: chains to keep.
        deletions: t, how many deletions to look ahead.

    Raises:
        InputError: more chains than slices, or probabilities out of range.
    """
    p = [float(v) for v in probabilities]
    if min(p) < 0 or sum(p) > 1 + 1e-9:
        raise InputError("Probabilities of slices must not be negative, and their sum not above 1.")
    if not 1 <= count <= len(p):
        raise InputError(f"Matching makes 1 to {len(p)} chains for {len(p)} slices; {count} were asked for.", "Choose fewer.")
    chains: list[Chain] = [(k,) for k in range(len(p))]
    for _ in range(len(p) - 1):
        gain = np.full((len(p), len(p)), -1e9)
        for row, chain in enumerate(chains):
            for place in set(range(len(p))) - set(chain):
                gain[row, place] = score([*chain, place], p, deletions)
        _, chosen = optimize.linear_sum_assignment(gain, maximize=True)
        chains = [(*chain, int(place)) for chain, place in zip(chains, chosen, strict=True)]
    return sorted(chains, key=lambda chain: -score(chain, p, deletions))[:count]


def length(chain: Sequence[int], hit: Collection[int]) -> int:
    """How many stages of a chain are left when slices are ``hit``: those before the first of them."""
    return next((k for k, place in enumerate(chain) if place in hit), len(chain))


def expected_deletions(shards: int, slices: int, chains: int) -> float:
    """Uniform deletions until no chain is left, on average: ``m L H`` with H the harmonic number of ``m min(B, L)``.

    Each shard has ``min(B, L)`` slices that begin a chain, and all of them must be hit.
    """
    return shards * slices * sum(1 / k for k in range(1, shards * min(chains, slices) + 1))
