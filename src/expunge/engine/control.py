"""Looking at the forget examples while they are forgotten: which of them are done and rest, and when training is over.

A *control* is asked after every so many passes over the forget set. It sees the model and the examples, never a retrained model
or the part of the holdout that an audit judges by. It works beside any schedule and with any terms.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        made: what the preparation made, by name.
        seed: of the run.
    """

    adapter: Adapter
    model: nn.Module
    examples: Mapping[Stream, Sequence[Example]]
    targets: Targets
    max_units: int
    made: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Decision:
    """What a control says.

    Attributes:
        resting: forget examples, by index, that are left out of the steps until the next look.
        stop: why training is over, in words that complete "Stopped after 7 steps: ..."; empty: it goes on.
        seen: numbers for the log.
        fresh: forget examples that take the place of those there are, as many; none: these stay.
    """

    resting: frozenset[int] = frozenset()
    stop: str = ""
    seen: Mapping[str, float] = field(default_factory=dict)
    fresh: Sequence[Example] | None = None


class Control(Settings, abc.ABC):
    """One control and its parameters."""

    name: ClassVar[str]
    offers: ClassVar[frozenset[Offer]] = frozenset()  #: what it asks of the adapter
    uses: ClassVar[frozenset[str]] = frozenset()  #: names of things that a preparation must have made
    renews: ClassVar[bool] = False  #: whether it puts other forget examples in the place of those that are there

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

    def renewed(self, sight: Sight, state: dict[str, Any]) -> Sequence[Example] | None:
        """The forget examples that it put in last, made again from ``state`` after a kill; none: it put none in."""
        return None

    def notes(self, state: dict[str, Any]) -> list[str]:
        """What a report must say of what it saw, one sentence each; asked at the end."""
        return []

    def record(self, state: dict[str, Any]) -> dict[str, Any]:
        """What is kept of ``state`` beside the model; JSON."""
        return {}


class Steering:
    """A recipe's control at work (or none): it thins out the steps and says when they end.

    Args:
        control: the recipe's.
        sight: what it sees, with the model unwrapped.
        pairs: whether each retain example belongs to the forget example of the same index.
        per_epoch: steps of a pass over the forget set.
        sharded: whether a process holds parts of the model only.
        world: number of processes.

    Raises:
        InputError: a control on a sharded model, or one that renews the examples in several processes.
    """

    def __init__(
        self, control: Control | None, sight: Sight, *, pairs: bool, per_epoch: int, sharded: bool, world: int = 1
    ) -> None:
        if control is not None and sharded:
            raise InputError(f"control={control.name} does not work on a sharded (FSDP) model.", "Use control=none.")
        if control is not None and control.renews and world > 1:
            raise InputError(f"control={control.name} makes examples as it goes.", "Run it on one process.")
        self.control, self.sight, self.pairs = control, sight, pairs
        self.period = max(1, math.ceil(control.every * per_epoch)) if control is not None else 0
        self.resting: frozenset[int] = frozenset()
        self.said = ""
        self.state: dict[str, Any] = {}
        self.fresh: Sequence[Example] | None = None

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
        self.resting, self.said, self.fresh = found.resting, found.stop, found.fresh
        row |= {f"control.{k}": v for k, v in found.seen.items()} | {"control.resting": float(len(self.resting))}
        return bool(found.stop)

    def renewed(self) -> Mapping[Stream, Sequence[Example]] | None:
        """All streams, if the last look (or the state that was restored) put other forget examples in; told once.

        Raises:
            InputError: there are more or less of them than there were.
        """
        fresh, self.fresh = self.fresh, None
        if fresh is None or self.control is None:
            return None
        if len(fresh) != len(self.sight.examples[Stream.FORGET]):
            raise InputError(f"control={self.control.name} must put as many examples in as there are.")
        self.sight = replace(self.sight, examples={**self.sight.examples, Stream.FORGET: fresh})
        return self.sight.examples

    def notes(self) -> list[str]:
        """What a report must say."""
        return self.control.notes(self.state) if self.control is not None else []

    def record(self) -> dict[str, Any]:
        """What is kept beside the model."""
        return self.control.record(self.state) if self.control is not None else {}

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"state": self.state, "resting": sorted(self.resting)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Undo :meth:`saved`."""
        self.state, self.resting = saved["state"], frozenset(saved["resting"])
        if self.control is not None:
            self.fresh = self.control.renewed(self.sight, self.state)
