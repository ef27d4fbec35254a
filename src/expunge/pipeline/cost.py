"""What a stage will cost, said before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expunge.adapters.base import Example
from expunge.core.access import Stream
from expunge.core.files import size
from expunge.engine.adaptive import SHARES, TRIAL_STEPS
from expunge.engine.parts import Recipe


@dataclass(frozen=True)
class Cost:
    """An estimate: at most ``steps`` optimiser steps over ``tokens`` input tokens, ``memory`` bytes, ``disk`` bytes."""

    steps: int
    tokens: int
    memory: int
    disk: int
    parameters: int

    def text(self) -> str:
        """One line for people."""
        return (
            f"at most {self.steps:,} steps, {self.tokens:,} tokens, about {size(self.memory)} of memory "
            f"and {size(self.disk)} of disk ({self.parameters:,} parameters)"
        )

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        return asdict(self)


def estimate(recipe: Recipe, examples: Mapping[Stream, Sequence[Example]], parameters: int, memory: int, disk: int) -> Cost:
    """Upper bounds for one training stage, the range test included."""
    schedule = recipe.schedule
    anchor = Stream.FORGET if recipe.forget else Stream.RETAIN
    n = len(examples[anchor])
    batch = min(schedule.batch, n)
    per_epoch = math.ceil(n / batch)
    steps = schedule.total_steps(per_epoch)
    if schedule.lr is None:
        steps += len(SHARES) * max(2, min(TRIAL_STEPS, steps // 4))

    def mean(stream: Stream) -> float:
        held = examples.get(stream, ())
        return sum(e.size for e in held) / len(held) if held else 0.0

    per_step = batch * mean(anchor)
    if recipe.forget:
        per_step += batch * mean(Stream.ALTERNATIVE) * (len(examples.get(Stream.ALTERNATIVE, ())) // max(1, n))
        per_step += (schedule.retain_batch or schedule.batch) * mean(Stream.RETAIN) if recipe.retain else 0
    return Cost(steps, int(steps * per_step), memory, disk, parameters)
