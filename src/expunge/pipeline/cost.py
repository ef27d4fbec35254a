"""What a stage will cost, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expunge.adapters.base import Example
from expunge.core.access import Stream
from expunge.core.files import size
from expunge.engine.adaptive import SHARES, TRIAL_STEPS
from expunge.engine.parts import Recipe
from expunge.engine.portions import portions


@dataclass(frozen=True)
class Cost:
    """An estimate: at most ``steps`` optimiser steps over ``tokens`` input tokens, ``memory`` bytes, ``disk`` bytes."""

    steps: int
    tokens: int
    memory: int
    disk: int
    parameters: int

    def text(self, unit: str = "tokens") -> str:
        """One line for people; ``unit`` is what one unit of an example's size is called (a token; a row)."""
        return (
            f"at most {self.steps:,} steps, {self.tokens:,} {unit}, about {size(self.memory)} of memory "
            f"and {size(self.disk)} of disk ({self.parameters:,} parameters)"
        )

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        return asdict(self)


def estimate(recipe: Recipe, examples: Mapping[Stream, Sequence[Example]], parameters: int, memory: int, disk: int) -> Cost:
    """Upper bounds for one training stage, the range test included."""
    sizes = {s: len(examples.get(s, ())) for s in (Stream.FORGET, Stream.RETAIN)}
    plan, _ = portions(recipe, sizes, 0)

    def mean(stream: Stream) -> float:
        held = examples.get(stream, ())
        return sum(e.size for e in held) / len(held) if held else 0.0

    of_side = {Stream.FORGET: mean(Stream.FORGET) + mean(Stream.ALTERNATIVE), Stream.RETAIN: mean(Stream.RETAIN)}
    tokens = sum(rows * of_side[Stream(name)] for name, rows in plan.visits().items())
    steps = plan.steps
    if recipe.schedule.lr is None:
        trials = len(SHARES) * max(2, min(TRIAL_STEPS, steps // 4))
        tokens *= 1 + trials / max(1, steps)
        steps += trials
    return Cost(steps, int(tokens), memory, disk, parameters)
