"""Looking at the forget examples while they are forgotten: which of them are done and rest, and when training is over.

A *control* is asked after every so many passes over the forget set. It sees the model and the examples, never a retrained model
or the part of the holdout that an audit judges by. It works beside any schedule and with any terms.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from expunge.adapters.base import Adapter, Example, Targets
from expunge.adapters.passes import evaluating
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.settings import Settings


@dataclass(frozen=True)
class Sight:
    """What a control sees.

    Attributes:
        adapter: the modality.
        model: as it is now, in evaluation mode.
        examples: by stream.
        targets: on which targets of the forget examples the forgetting shows.
        max_units: size of a forward pass.
    """

    adapter: Adapter
    model: nn.Module
    examples: Mapping[Stream, Sequence[Example]]
    targets: Targets
    max_units: int


@dataclass(frozen=True)
class Decision:
    """What a control says.

    Attributes:
        resting: forget examples, by index, that are left out of the steps until the next look.
        stop: why training is over, in words that complete "Stopped after 7 steps: ..."; empty: it goes on.
        seen: numbers for the log.
    """

    resting: frozenset[int] = frozenset()
    stop: str = ""
    seen: Mapping[str, float] = field(default_factory=dict)


class Control(Settings, abc.ABC):
    """One control and its parameters."""

    name: ClassVar[str]
    offers: ClassVar[frozenset[Offer]] = frozenset()  #: what it asks of the adapter

    every: float = Field(1.0, gt=0, description="passes over the forget set from one look to the next")

    @property
    def reads(self) -> frozenset[Stream]:
        """Examples that it looks at, beside those to forget."""
        return frozenset()

    def begin(self, sight: Sight, state: dict[str, Any]) -> None:
        """Take note of the target before the first step; ``state`` is JSON and kept in checkpoints."""

    @abc.abstractmethod
    def look(self, sight: Sight, state: dict[str, Any]) -> Decision:
        """Look at the model as it is now."""


class Steering:
    """A recipe's control at work (or none): it thins out the steps and says when they end.

    Args:
        control: the recipe's.
        sight: what it sees, with the model unwrapped.
        pairs: whether each retain example belongs to the forget example of the same index.
        per_epoch: steps of a pass over the forget set.
        sharded: whether a process holds parts of the model only.

    Raises:
        InputError: a control on a sharded model.
    """

    def __init__(self, control: Control | None, sight: Sight, *, pairs: bool, per_epoch: int, sharded: bool) -> None:
        if control is not None and sharded:
            raise InputError(f"control={control.name} does not work on a sharded (FSDP) model.", "Use control=none.")
        self.control, self.sight, self.pairs = control, sight, pairs
        self.period = max(1, math.ceil(control.every * per_epoch)) if control is not None else 0
        self.resting: frozenset[int] = frozenset()
        self.said = ""
        self.state: dict[str, Any] = {}

    def thin(self, plan: Mapping[str, Sequence[int]]) -> dict[Stream, list[int]]:
        """The examples of a step without those that rest; empty if all that it was to forget rest."""
        out = {Stream(name): list(indices) for name, indices in plan.items()}
        if self.pairs and Stream.RETAIN in out:
            out[Stream.RETAIN] = out.get(Stream.FORGET, out[Stream.RETAIN])
        if not self.resting:
            return out
        thinned = (Stream.FORGET, Stream.RETAIN) if self.pairs else (Stream.FORGET,)
        for stream in [s for s in thinned if s in out]:
            out[stream] = [i for i in out[stream] if i not in self.resting]
            if not out[stream]:
                return {}
        return out

    def begin(self) -> None:
        """The look at the target."""
        if self.control is not None:
            with evaluating(self.sight.model):
                self.control.begin(self.sight, self.state)

    def after(self, done: int, row: dict[str, float]) -> bool:
        """Look if it is time, note what was seen in the log's ``row``; whether training is over."""
        if self.control is None or done % self.period:
            return False
        with evaluating(self.sight.model):
            found = self.control.look(self.sight, self.state)
        self.resting, self.said = found.resting, found.stop
        row |= {f"control.{k}": v for k, v in found.seen.items()} | {"control.resting": float(len(self.resting))}
        return bool(found.stop)

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"state": self.state, "resting": sorted(self.resting)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Undo :meth:`saved`."""
        self.state, self.resting = saved["state"], frozenset(saved["resting"])
