"""What prepared methods with shards share: dealing rows, and training a stage anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expunge.core.errors import InputError
from expunge.data.rows import Table
from expunge.engine.functional import Tensors, digest_tensors
from expunge.engine.source import Source
from expunge.engine.tasks import threads


def deal(rows: int, shards: int, slices: int, seed: int, risk: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.int64]:
    """Shard and slice of each row, ``[rows, 2]``: equally many, at random, or within a shard in the order of ``risk`` ``[rows]``.

    Raises:
        InputError: fewer rows than slices.
    """
    if rows < shards * slices:
        raise InputError(
            f"{rows} rows cannot be dealt into {shards} shards of {slices} slices.", "Choose fewer shards or slices."
        )
    place = np.empty((rows, 2), dtype=np.int64)
    for s, shard in enumerate(np.array_split(np.random.default_rng([seed, 31]).permutation(rows), shards)):
        held = shard if risk is None else shard[np.argsort(risk[shard], kind="stable")]
        for r, part in enumerate(np.array_split(held, slices)):
            place[part] = s, r
    return place


@dataclass(frozen=True)
class Stage:
    """The training of one model on some rows, from weights that it was given."""

    source: Source
    inputs: Tensor
    targets: Tensor
    training: Any
    seed: int
    start: Tensors


def train_stage(count: int, stage: Stage) -> Tensors:
    """The weights after a stage; a function of its arguments alone, so that it may run anywhere.

    Args:
        count: threads.
        stage: model, rows, training and start; the table of its source is not read.
    """
    with threads(count):
        return stage.source.learn(stage.inputs, stage.targets, stage.training, stage.seed, stage.start)


def without_rows(source: Source) -> Source:
    """The same source with an empty table: workers get the rows of their stage alone."""
    held = source.table
    empty = Table((), held.inputs[:0], held.targets[:0], held.task, held.classes)
    return dataclasses.replace(source, table=empty, training=None)


def digest_rows(source: Source, ids: list[str]) -> str:
    """SHA-256 of the inputs and targets of some rows, in that order."""
    return digest_tensors(iter(source.rows(ids)))


def derived(seed: int, *parts: int) -> int:
    """A seed for a part of the work; for the first part of all the seed itself, so that one part alone is plain training."""
    if not any(parts):
        return seed
    return int.from_bytes(hashlib.sha256(repr((seed, parts)).encode()).digest()[:4], "little")
