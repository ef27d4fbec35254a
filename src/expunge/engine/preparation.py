"""What a method makes from the target and the data before training: other examples, frozen networks, predicted outputs.

A preparation is run once, before the loss is put together, on the target as it was given. What it makes is read by the terms:
streams through the batches, models and predictions as :class:`~expunge.core.access.Of`, everything else by name
(``views.made``).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.passes import evaluating
from expunge.core.access import Of, Offer, Stream
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.data.records import Record
from expunge.engine.options import Engine

Examples = Mapping[Stream, Sequence[Example]]
R = TypeVar("R", bound=Settings)
Tell = Callable[[int, int, str], None]  #: (done, of how many, what is being done)

_PREFIX = "grown_"


def _leaf(model: nn.Module) -> nn.Module:
    """A layer with weights of its own: unlike a container, it does not run what is added to it."""
    return next(m for m in model.modules() if list(m.parameters(recurse=False)))


class ReferenceSource(Protocol):
    """Where the outputs of a frozen model come from."""

    def outputs(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Outputs of the frozen model on ``batch``, without gradients; ``model`` is the current one."""


@dataclass(frozen=True)
class Prepared:
    """What a preparation made.

    Attributes:
        examples: streams that take the place of those given (all streams, once :func:`run_preparation` has returned it).
        sources: frozen models, or predictions of their outputs.
        made: everything else that terms read, by name.
        grown: networks among ``made``, by name, that are trained with the model and dropped afterwards.
        chosen: values of fields that were left open, by the field's name: every part of the recipe that has it gets it.
        notes: what a report must say, one sentence each.
        idle: why there is nothing to train, in words that complete "Stopped after 0 steps: ..."; empty: there is.
    """

    examples: Examples = field(default_factory=dict)
    sources: Mapping[Of, ReferenceSource] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    grown: Mapping[str, nn.Module] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    idle: str = ""

    def settled(self, recipe: R) -> R:
        """The recipe with what was chosen, in every part that left it open (a field that is none)."""

        def filled(part: Settings) -> Settings:
            known = type(part).model_fields
            new = {k: v for k, v in self.chosen.items() if k in known and getattr(part, k) is None}
            return part.model_copy(update=new) if new else part

        if not self.chosen:
            return recipe
        held = {name: getattr(recipe, name) for name in type(recipe).model_fields}
        new: dict[str, Any] = {n: filled(v) for n, v in held.items() if isinstance(v, Settings)}
        new |= {n: tuple(filled(t) for t in v) for n, v in held.items() if isinstance(v, tuple)}
        return recipe.model_copy(update=new)

    def attach(self, model: nn.Module) -> None:
        """Make what is grown a part of ``model``: trained, kept in checkpoints and restored like its own weights."""
        for name, module in self.grown.items():
            _leaf(model).add_module(_PREFIX + name, module)

    def drop(self, model: nn.Module) -> None:
        """Undo :meth:`attach`."""
        for module in list(model.modules()):
            for name in self.grown:
                if _PREFIX + name in dict(module.named_children()):
                    delattr(module, _PREFIX + name)

    def names(self) -> frozenset[str]:
        """Names of the streams, models and things that it holds."""
        return frozenset({*map(str, self.examples), *map(str, self.sources), *self.made})


class Preparation(Settings, abc.ABC):
    """One preparation and its parameters."""

    name: ClassVar[str]
    reads: ClassVar[tuple[Stream, ...]]  #: examples that it reads
    makes: ClassVar[frozenset[str]]  #: streams, models (``Of``) and names of things that are there afterwards
    chooses: ClassVar[frozenset[str]] = frozenset()  #: names of fields of other parts that it fills in where they are none
    offers: ClassVar[frozenset[Offer]] = frozenset()  #: what it asks of the adapter
    pairs: ClassVar[bool] = False  #: whether it makes one retain example for each forget example: they go through steps together
    added_tokens: ClassVar[tuple[str, ...]] = ()  #: texts that the model must read as one token: it gets those it lacks
    marks: ClassVar[bool] = False  #: whether it marks the targets of what it makes, and sees to it that there are some

    def check(self) -> None:
        """Refuse files that it names and that are not what they should be; asked before anything starts.

        Raises:
            InputError: naming the file.
        """

    def examine(self, adapter: Adapter, examples: Examples) -> None:
        """Refuse examples that it cannot work with; asked before anything starts, where there is time for that.

        Raises:
            InputError: saying what is missing.
        """
        return

    def rewritten(
        self, forget: Sequence[Record], retain: Sequence[Record], seed: int
    ) -> tuple[Sequence[Record], Sequence[Record]]:
        """The records that are trained on in place of those of the request, where these are texts.

        Raises:
            InputError: they do not hold what is needed.
        """
        return forget, retain

    def planned(self, examples: Examples) -> Examples:
        """Examples in the number and size of those that will be trained on, for the estimate of the cost."""
        return examples

    @abc.abstractmethod
    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Make it. The result must depend on the arguments and torch's random state alone, which is set from the seed before.

        A run that was killed prepares again: what takes long belongs into files.

        Args:
            adapter: holds the target, on the device of the run, in evaluation mode; it must be left as it is.
            examples: by stream.
            engine: seed, and examples per forward pass (``max_tokens``).
            scratch: folder for files that a run that goes on after a kill finds again; it may not exist yet.
            tell: called with what is being done.
        """


def run_preparation(
    part: Preparation | None, adapter: Adapter, examples: Examples, engine: Engine, *, scratch: Path, tell: Tell | None = None
) -> Prepared:
    """Run a preparation (or none), leaving torch's random state as it was; all streams are in the result.

    Raises:
        InputError: the adapter lacks what it reads, a stream is missing, or it did not make what it declares.
    """
    if part is None:
        return Prepared(dict(examples))
    missing = sorted(part.offers - adapter.offers)
    if missing:
        raise InputError(
            f"preparation={part.name} needs {', '.join(missing)}, which a model for {adapter.modality} does not offer."
        )
    for stream in part.reads:
        if not examples.get(stream):
            raise InputError(f"preparation={part.name} reads {stream} examples, but there are none.", f"Give a {stream} set.")
    with torch.random.fork_rng(), evaluating(adapter.model):
        torch.manual_seed(engine.seed)
        found = part.prepare(adapter, examples, engine, scratch, tell)
    absent = sorted((part.makes | part.chooses) - found.names() - frozenset(found.chosen))
    if absent:
        raise InputError(f"preparation={part.name} declares {', '.join(absent)}, but has not made it.")
    if part.pairs and len(found.examples.get(Stream.RETAIN, ())) != len(examples.get(Stream.FORGET, ())):
        raise InputError(f"preparation={part.name} must make one retain example for each forget example.")
    return replace(found, examples={**examples, **found.examples})
