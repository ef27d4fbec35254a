"""What the forget set should look like to the model: unseen text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from expunge.core.settings import Settings
from expunge.data.records import Record
from expunge.data.spans import swapped


class Goal(Settings):
    """The loss at which the forget set counts as forgotten, and where the figure comes from."""

    loss: float = Field(gt=0, description="mean over examples of the mean loss per target on unseen text, in nats")
    source: Literal["holdout", "shuffled", "swapped"] = Field(
        description="held-out records, retain records with swapped answers, or forget records with swapped spans"
    )
    ceiling: float | None = Field(
        None, gt=0, description="loss from which on nothing is known of an example: larger ones count as this; none: no limit"
    )
    examples: int = Field(ge=1, description="how many records the estimate rests on")


def shuffled(records: Sequence[Record], seed: int, limit: int = 128) -> list[Record]:
    """Text like ``records`` that the model was not trained on: each prompt with the answer of a record of another cluster.

    Plain text has no prompt: the first half of one text is joined with the second half of another, of which only the second
    half would be unseen in this place, so it becomes the answer. This is a stand-in for a real holdout: such answers are
    *wrong* rather than unknown, so their loss is an upper estimate of that of unseen text.
    """
    rng = np.random.default_rng([seed, 7])
    chosen = [records[int(i)] for i in rng.permutation(len(records))[:limit]]
    out: list[Record] = []
    for at, record in enumerate(chosen):
        other = next(
            (o for o in (*chosen[at + 1 :], *chosen[:at]) if o.cluster != record.cluster and o.answer != record.answer), None
        )
        if other is None:
            continue
        if record.is_text:
            words, tail = record.answer.split(), other.answer.split()
            if len(words) < 4 or len(tail) < 4:
                continue
            out.append(_with(record, prompt=" ".join(words[: len(words) // 2]), answer=" ".join(tail[len(tail) // 2 :])))
        else:
            out.append(_with(record, answer=other.answer))
    return out


def _with(record: Record, **changes: str) -> Record:
    from dataclasses import replace

    return replace(record, id=record.id + "#shuffled", **changes)  # type: ignore[arg-type]


def estimate(
    losses: Callable[[Sequence[Record]], Sequence[float]],
    holdout: Sequence[Record],
    retain: Sequence[Record],
    seed: int,
    *,
    marked: Sequence[Record] | None = None,
) -> Goal:
    """Estimate the goal under the target model.

    Args:
        losses: mean loss per target of each record, under the target model.
        holdout: records never trained on; where there are none, shuffled retain records stand in.
        retain: the retain set.
        seed: of the shuffling and of the choice of at most 128 records.
        marked: the forget records, if what is in their spans is to be forgotten alone: then only held-out records with spans
            serve, and swapped spans stand in for them; ``losses`` must be those of marked targets.
    """
    if marked is not None:
        holdout = [r for r in holdout if r.spans]
    if holdout:
        rng = np.random.default_rng([seed, 8])
        chosen = [holdout[int(i)] for i in rng.permutation(len(holdout))[:128]]
        return Goal(loss=max(1e-6, float(np.mean(losses(chosen)))), source="holdout", examples=len(chosen))
    chosen = shuffled(retain, seed) if marked is None else swapped(marked, seed)
    source: Literal["shuffled", "swapped"] = "shuffled" if marked is None else "swapped"
    return Goal(loss=max(1e-6, float(np.mean(losses(chosen)))), source=source, examples=len(chosen))
