"""Edits: methods that change the weights at once, by a formula, without training."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.engine.devices import peak_bytes
from expunge.engine.gradients import moving
from expunge.engine.options import Engine
from expunge.engine.outcome import Outcome
from expunge.engine.parts import Paper

Tell = Callable[[int, int, str], None]  #: (done, of how many, what is being done)
Examples = Mapping[Stream, Sequence[Example]]


class Edit(Settings, abc.ABC):
    """One edit and its parameters; registered by :func:`expunge.methods.edits.registry.edit`."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper]
    formula: ClassVar[str]
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES})  #: what it reads of the model
    streams: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)  #: which examples it reads
    caveats: ClassVar[tuple[str, ...]] = ()

    def spec(self) -> dict[str, Any]:
        """A plain mapping from which the edit can be made again."""
        return {"name": self.name, **self.model_dump(mode="json")}

    @abc.abstractmethod
    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """The new value of each parameter that changes, by name, from the model as it is; nothing is changed here."""

    def notes(self, adapter: Adapter, made: Mapping[str, Tensor], examples: Examples) -> list[str]:
        """What a report must say of the new values ``made``, one sentence each; the model is still as it was.

        Raises:
            InputError: they would do harm.
        """
        return []


def apply_edit(adapter: Adapter, edit: Edit, examples: Examples, engine: Engine, *, progress: Tell | None = None) -> Outcome:
    """Change ``adapter.model`` by an edit, all weights at once or none.

    Raises:
        InputError: the adapter lacks what the edit reads, a set of examples is missing, or the result is not finite.
    """
    started = time.perf_counter()
    missing = sorted(edit.offers - adapter.offers)
    if missing:
        raise InputError(f"{edit.name!r} reads {', '.join(missing)}, which a model for {adapter.modality} does not offer.")
    for stream in edit.streams:
        if not examples.get(stream):
            raise InputError(f"The method {edit.name!r} reads {stream} examples, but there are none.")
    torch.manual_seed(engine.seed)
    made = edit.weights(adapter, examples, engine, progress)
    for name, value in made.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{edit.name!r} would make {name!r} infinite or NaN.", "Use milder parameters; nothing was changed.")
    notes = edit.notes(adapter, made, examples)
    parameters = moving(adapter.model)
    changed = total = 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            total += parameter.numel()
            if name in made:
                changed += int((parameter != made[name]).sum())
                parameter.copy_(made[name])
    share = 100 * changed / max(1, total)
    sentence = f"Edited {changed:,} of {total:,} weights ({share:.1f} %) by {edit.name}."
    return Outcome(
        adapter.model, "edited", sentence, 0, 0.0, seconds=time.perf_counter() - started,
        tokens=sum(e.size for s in edit.streams for e in examples[s]),
        peak_bytes=peak_bytes(next(adapter.model.parameters()).device), notes=notes,
    )  # fmt: skip
