"""Which examples are seen at which step: a function of the seed and the step alone.

The plan is made once for the whole job. It knows nothing of processes, data-loader workers or gradient accumulation; a process
takes its :func:`share` of the global batch. So the pairing of forget with retain examples is the same on one process and on
eight, and a resumed run asks for the step at which it stopped.

* The *anchor* stream (the forget set) defines the epoch: a permutation of its examples, cut into batches. If the batch size
  does not divide the set, the last batch of the epoch is smaller; nothing is seen twice in an epoch or left out.
* Every other stream cycles through permutations of its own, without replacement: after a pass a new permutation begins, if
  need be in the middle of a batch (which may then hold an example twice). The batch size is constant.

Permutations sort raw 64-bit outputs of NumPy's Philox generator, keyed by a ``SeedSequence`` of the seed, the stream's name and
the number of the pass. Both are covered by NumPy's promise of stable streams, which ``Generator.permutation`` is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError

Permutation = npt.NDArray[np.int64]


class BatchPlan:
    """The indices of each stream at each step; random access in O(batch) amortised over an epoch.

    Args:
        sizes: examples of each stream, the anchor's first: ``{"forget": 400, "retain": 3600}``.
        batch: global batch size of each stream (over all processes and accumulation steps).
        seed: non-negative.
        steps: number of steps; the length of the plan.

    Raises:
        InputError: a stream is empty, a batch size is below 1, or names do not match.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch: Mapping[str, int],
        *,
        seed: int,
        steps: int,
    ) -> None:
        _check(sizes, batch, seed, steps)
        self.sizes = dict(sizes)
        self.batch = {name: int(batch[name]) for name in sizes}
        self.seed = seed
        self.steps = steps
        self.anchor = next(iter(self.sizes))
        self._passes: dict[str, dict[int, Permutation]] = {name: {} for name in sizes}

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every anchor example is seen once, the last, possibly smaller batch included."""
        return -(-self.sizes[self.anchor] // self.batch[self.anchor])

    def ends(self) -> list[int]:
        """Numbers of steps after which an epoch is over; the last epoch may be cut short."""
        whole = list(range(self.steps_per_epoch, self.steps + 1, self.steps_per_epoch))
        return whole if whole[-1:] == [self.steps] else [*whole, self.steps]

    def visits(self) -> dict[str, int]:
        """How many examples of each stream are seen, each as often as it is."""
        found = {name: self.steps * size for name, size in self.batch.items()}
        epochs, left = divmod(self.steps, self.steps_per_epoch)
        found[self.anchor] = epochs * self.sizes[self.anchor] + left * self.batch[self.anchor]
        return found

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, to which a step belongs."""
        return step // self.steps_per_epoch

    def plan(self, step: int) -> dict[str, list[int]]:
        """The global batch of a step, counted from 0.

        Raises:
            IndexError: the step is not in [0, steps).
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in [0, {self.steps})")
        return {name: self._anchored(step) if name == self.anchor else self._cycled(name, step) for name in self.sizes}

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self.plan(step) for step in range(self.steps))

    def _anchored(self, step: int) -> list[int]:
        epoch, at = divmod(step, self.steps_per_epoch)
        size = self.batch[self.anchor]
        return _ints(self._pass(self.anchor, epoch)[at * size : (at + 1) * size])

    def _cycled(self, name: str, step: int) -> list[int]:
        size, total = self.batch[name], self.sizes[name]
        drawn: list[int] = []
        position = step * size
        while len(drawn) < size:
            number, at = divmod(position + len(drawn), total)
            drawn += _ints(self._pass(name, number)[at : at + size - len(drawn)])
        return drawn

    def _pass(self, name: str, number: int) -> Permutation:
        """The permutation of one pass over a stream; the last two are kept."""
        held = self._passes[name]
        if number not in held:
            while len(held) > 1:
                del held[next(iter(held))]
            held[number] = self._draw(name, number)
        return held[number]

    def _draw(self, name: str, number: int) -> Permutation:
        key = [int(word) for word in np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")[:4]]
        raw = np.random.Philox(np.random.SeedSequence([self.seed, number, *key]))
        return _permutation(raw, self.sizes[name])


class TurnPlan:
    """Passes over two streams in turn: each epoch has one over the first (while there are any left), then one over the second.

    Args:
        sizes: examples of the two streams.
        batch: batch size of each.
        seed: non-negative.
        passes: how often each stream is passed over, the second at least once.

    Raises:
        InputError: as :class:`BatchPlan`, or no pass over the second stream.
    """

    def __init__(self, sizes: Mapping[str, int], batch: Mapping[str, int], *, seed: int, passes: Mapping[str, int]) -> None:
        self.first, self.second = sizes
        if passes[self.second] < 1:
            raise InputError("Turns need at least one epoch.", "Give epochs of 1 or more.")
        self._plans = {
            name: BatchPlan({name: size}, {name: batch[name]}, seed=seed, steps=-(-size // batch[name]) * passes[name])
            for name, size in sizes.items()
        }
        self._own = {name: plan.steps_per_epoch for name, plan in self._plans.items()}
        self._early = min(passes[self.first], passes[self.second])
        self.steps = self._early * self._own[self.first] + passes[self.second] * self._own[self.second]
        self.steps_per_epoch = -(-self.steps // passes[self.second])

    def visits(self) -> dict[str, int]:
        """How many examples of each stream are seen, each as often as it is."""
        passes = {
            self.first: self._early,
            self.second: (self.steps - self._early * self._own[self.first]) // self._own[self.second],
        }
        return {name: passes[name] * plan.sizes[name] for name, plan in self._plans.items()}

    def ends(self) -> list[int]:
        """Numbers of steps after which an epoch is over."""
        both = self._own[self.first] + self._own[self.second]
        early = [both * (epoch + 1) for epoch in range(self._early)]
        start = early[-1] if early else 0
        return [*early, *range(start + self._own[self.second], self.steps + 1, self._own[self.second])]

    def turn(self, step: int) -> tuple[str, int]:
        """The stream that a step reads, and the step's number among those of the stream."""
        both = self._own[self.first] + self._own[self.second]
        if step < self._early * both:
            epoch, at = divmod(step, both)
            if at < self._own[self.first]:
                return self.first, epoch * self._own[self.first] + at
            return self.second, epoch * self._own[self.second] + at - self._own[self.first]
        return self.second, step - self._early * self._own[self.first]

    def plan(self, step: int) -> dict[str, list[int]]:
        """The global batch of a step, of one stream.

        Raises:
            IndexError: the step is not in [0, steps).
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not in [0, {self.steps})")
        name, at = self.turn(step)
        return self._plans[name].plan(at)


def _ints(values: Permutation) -> list[int]:
    return [int(v) for v in values]


def _permutation(raw: np.random.Philox, n: int) -> Permutation:
    return np.argsort(np.atleast_1d(raw.random_raw(n)), kind="stable").astype(np.int64)


def share(indices: Sequence[int], rank: int, world: int) -> list[int]:
    """The contiguous part of a global batch that belongs to one process.

    The parts follow each other in order of rank, and their sizes differ by at most one; with more processes than indices some are
    empty.

    Args:
        indices: the global batch.
        rank: the process, in [0, world).
        world: number of processes, at least 1.

    Raises:
        ValueError: the rank is not in [0, world).
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in [0, {world})")
    return list(indices[len(indices) * rank // world : len(indices) * (rank + 1) // world])


def _check(sizes: Mapping[str, int], batch: Mapping[str, int], seed: int, steps: int) -> None:
    if not sizes:
        raise InputError("A plan of batches needs at least one stream.")
    if set(sizes) != set(batch):
        raise InputError(
            f"The plan has the streams {sorted(sizes)} but batch sizes for {sorted(batch)}.", "Give one batch size each."
        )
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"The stream {name!r} is empty.", "Give it at least one example.")
        if batch[name] < 1:
            raise InputError(f"The batch size of {name!r} must be an int in [1, inf); got {batch[name]}.")
    if seed < 0 or steps < 0:
        raise InputError(f"Seed and steps of a plan must be ints in [0, inf); got {seed} and {steps}.")
