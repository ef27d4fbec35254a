"""Several optimiser states over the same parameters, one for each group of terms that takes steps of its own."""

from __future__ import annotations

from typing import Any

import torch

from expunge.engine import checkpoint


class States:
    """One optimiser whose memory (momentum, second moments) is exchanged with the turn; between steps that of turn 0 is in it.

    Args:
        optimizer: of all parameters.
        turns: how many.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, turns: int) -> None:
        self.optimizer, self.turns = optimizer, turns
        self._held: list[dict[Any, Any]] = [{} for _ in range(turns)]
        self._now = 0

    def take(self, turn: int) -> None:
        """Put the memory of a turn into the optimiser."""
        if turn == self._now:
            return
        state: Any = self.optimizer.state
        self._held[self._now] = dict(state)
        state.clear()
        state.update(self._held[turn])
        self._now = turn

    def saved(self) -> dict[str, Any]:
        """For a checkpoint: the state dict of turn 0, with those of the others beside it."""
        found = []
        for turn in range(self.turns):
            self.take(turn)
            found.append(checkpoint.optimizer_state(self.optimizer))
        self.take(0)
        return {**found[0], "others": found[1:]}

    def restore(self, saved: dict[str, Any]) -> None:
        """Undo :meth:`saved`."""
        first = {k: v for k, v in saved.items() if k != "others"}
        for turn, state in enumerate([first, *saved["others"]]):
            self.take(turn)
            checkpoint.restore_optimizer(self.optimizer, state)
        self.take(0)


def joined(row: dict[str, float], seen: dict[str, float]) -> dict[str, float]:
    """What two turns of one step saw: losses added, the larger gradient, the rate of the first."""
    both = {**seen, **row}
    both["loss"] = row["loss"] + seen["loss"]
    both["gradient_norm"] = max(row["gradient_norm"], seen["gradient_norm"])
    return both
