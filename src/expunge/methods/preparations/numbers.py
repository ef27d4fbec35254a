"""Other numbers for the forget rows, drawn from the distribution of the targets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class NormalTargets(Preparation):
    """Each forget row with a draw from N(m, s), m and s the mean and standard deviation of all training targets.

    The draw is made once, by the row's id and the seed (Tarun et al. 2023, arXiv 2210.08196: Gaussian amnesiac).
    """

    name: ClassVar[str] = "normal-targets"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.NUMBERS, Offer.ROWS})

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Measure the targets and draw."""
        forget = examples[Stream.FORGET]
        everything = [*forget, *examples[Stream.RETAIN]]
        targets = torch.cat([adapter.collate(part).targets.double() for part in fitting(everything, engine.max_tokens)])
        mean, spread = float(targets.mean()), float(targets.std(correction=0))
        drawn = [mean + spread * _normal(e.id, engine.seed) for e in forget]
        made = [adapter.replace(e, answer=number, suffix="#drawn") for e, number in zip(forget, drawn, strict=True)]
        note = f"The targets of the {len(forget)} forget rows were replaced by draws from N({mean:.4g}, {spread:.4g})."
        return Prepared(examples={Stream.ALTERNATIVE: made}, notes=(note,))


def _normal(name: str, seed: int) -> float:
    key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return float(np.random.default_rng(int.from_bytes(key, "big")).standard_normal())
