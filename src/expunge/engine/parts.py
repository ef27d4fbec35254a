"""The parts of which a weight-updating method is composed, and the recipe that joins them.

    preparation x forget terms x retain terms x reference x parameters x gradient x balance x schedule x control
      x penalty x finish

Every part is a :class:`~expunge.core.settings.Settings`: immutable, typed, with declared ranges, usable from Python, YAML
and the command line alike.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example, Outputs, Targets
from expunge.core.access import Of, Offer, Stream
from expunge.core.search import Search
from expunge.core.settings import Settings
from expunge.engine.control import Control
from expunge.engine.moving import PLAIN, Moving
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Tell

Need = tuple[Stream, Of, str]  #: (which examples, under which model, which value: "losses", "logits" or "features:<layer>")


class Views(Mapping[tuple[Stream, Of], Outputs]):
    """What the terms may read in one step: outputs by stream and model, one forward pass per model for all streams.

    Args:
        outputs: by stream and model.
        layers: the adapter's block names, for terms that name a layer by its index.
        made: what the preparation made, by name.
    """

    def __init__(
        self,
        outputs: Mapping[tuple[Stream, Of], Outputs],
        layers: Sequence[str] = (),
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self._outputs = dict(outputs)
        self.layers = tuple(layers)
        self.made = dict(made or {})

    def __getitem__(self, key: tuple[Stream, Of]) -> Outputs:
        return self._outputs[key]

    def __iter__(self) -> Any:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def current(self, stream: Stream) -> Outputs:
        """Under the model being changed (with gradients)."""
        return self._outputs[stream, Of.CURRENT]

    def reference(self, stream: Stream) -> Outputs:
        """Under the frozen target model (no gradients)."""
        return self._outputs[stream, Of.REFERENCE]

    def incompetent(self, stream: Stream) -> Outputs:
        """Under a frozen network of the same shape that has learnt nothing (no gradients)."""
        return self._outputs[stream, Of.INCOMPETENT]

    def oracle(self, stream: Stream) -> Outputs:
        """Under a model that never saw the forget set, or as such a model is predicted to answer (no gradients)."""
        return self._outputs[stream, Of.ORACLE]

    def only(self, stream: Stream, which: Targets) -> Views:
        """The same with some of the targets of one stream, under all models."""
        if which == "all":
            return self
        held = {key: outputs.only(which) if key[0] is stream else outputs for key, outputs in self._outputs.items()}
        return Views(held, self.layers, self.made)


class Term(Settings, abc.ABC):
    """One summand of the loss, written on per-target quantities.

    A term returns one value per target, example or token; the engine sums and divides by the count over the *whole*
    optimiser step (all micro-batches, all processes), so accumulation and distribution never change the result.
    """

    name: ClassVar[str]  #: registered name
    per: ClassVar[Literal["target", "example", "token"]] = "target"  #: what a value belongs to, and is averaged over
    uses: ClassVar[frozenset[str]] = frozenset()  #: names of things that a preparation must have made
    whole: ClassVar[bool] = False  #: whether its value is one of a whole step, which then must fit into one forward pass
    selective: ClassVar[bool] = True  #: whether it can read some of the targets of its examples alone
    paired: ClassVar[bool] = False  #: whether it compares each forget example with its one and only alternative
    reverse: ClassVar[bool] = False  #: whether it teaches what is to be taken away again: only before a finish that does so

    weight: Annotated[float, Search(around=10)] = Field(1.0, ge=0, description="coefficient of the term in the loss")
    targets: Targets = Field(
        "all",
        description="which targets of its examples it reads: all, those in marked spans of their record, those in favoured spans "
        "(which a preparation finds: they are to be said), or the others",
    )

    @property
    @abc.abstractmethod
    def stream(self) -> Stream:
        """The examples whose count normalises the term, and under whose name its gradient travels (forget or retain)."""

    @abc.abstractmethod
    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """What the term reads; ``layers`` are the adapter's block names, for terms that name layers by index."""

    @abc.abstractmethod
    def values(self, views: Views) -> Tensor:
        """The term's values, float32 ``[N]``, ``[B]`` or ``[M]`` according to ``per``; the engine minimises their mean."""

    def joint(self) -> bool:
        """:attr:`whole`, for terms of which a setting decides it."""
        return self.whole

    def remarks(self, adapter: Adapter, examples: Examples, engine: Engine) -> tuple[str, ...]:
        """What a report must say of the target and the data, one sentence each; asked once, before anything has moved."""
        return ()

    def count(self, examples: Sequence[Example]) -> int:
        """By how much the sum of values is divided, for the examples of one optimiser step (all processes together)."""
        if self.per == "example":
            return len(examples)
        if self.per == "token":
            return sum(e.size for e in examples)
        return sum(e.n_targets for e in examples)

    def total(self, views: Views) -> Tensor:
        """Sum of the values on the targets that it reads: what the engine divides by :meth:`divisor`."""
        values = self.values(views.only(self.stream, self.targets))
        return values.to(torch.promote_types(values.dtype, torch.float32)).sum()

    def divisor(self, examples: Sequence[Example]) -> int:
        """The count on the targets that it reads, at least 1; an example with none of them does not count."""
        if self.targets == "all":
            return max(1, self.count(examples))
        held = [e.only(self.targets) for e in examples]
        return max(1, self.count(held if self.per == "token" else [e for e in held if e.n_targets]))


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    url: str


class Gradient(Settings, abc.ABC):
    """What is done to the gradient between accumulation and the optimiser's step."""

    name: ClassVar[str]
    by_term: ClassVar[bool] = True  #: whether the rule needs forget and retain gradients apart (two backward passes)

    def begin(
        self, moving: Moving, adapter: Adapter, model: nn.Module, examples: Mapping[Stream, Sequence[Example]], engine: Engine
    ) -> dict[str, Any]:
        """What the rule makes from model and data before the first step; :meth:`combine` finds it in ``moving.made``.

        ``model`` is the one that is to be trained, as it is before. A run that goes on after a kill makes it anew from the
        same model, so it must depend on the arguments alone.

        Raises:
            InputError: the rule does not fit the tensors that move.
        """
        return {}

    def notes(self, moving: Moving) -> list[str]:
        """What a report must say of the rule under this optimiser, one sentence each."""
        return []

    @abc.abstractmethod
    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any], moving: Moving = PLAIN) -> list[Tensor]:
        """One gradient per trainable tensor from the (already weighted and normalised) forget and retain gradients.

        ``state`` is the rule's memory between steps (tensors, numbers and lists of these: it is saved in checkpoints).
        """

    def entries(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Which entries may move in this step, one boolean mask per trainable tensor; none (an empty list) if all may.

        ``gradient`` is that of the whole loss. The engine sets it to 0 elsewhere and puts the values back that the step changed
        there all the same (by momentum, or by decay).
        """
        return []


class Balance(Settings, abc.ABC):
    """The coefficients of the forget and the retain side, which may react to what was measured."""

    name: ClassVar[str]

    @abc.abstractmethod
    def coefficients(self, state: dict[str, float], share: float = 0.5) -> tuple[float, float]:
        """Multipliers of all forget terms and of all retain terms in this step; ``share`` of its examples are to be forgotten."""

    @abc.abstractmethod
    def update(self, state: dict[str, float], epoch: float, forget: float, retain: float) -> None:
        """Take note of the (unweighted) forget and retain values of the whole optimiser step just done; ``epoch`` counts
        passes over the forget set."""


class Parameters(Settings, abc.ABC):
    """Which parameters move."""

    name: ClassVar[str]
    factors: ClassVar[bool] = False  #: whether what moves are factors beside the weights (a LoRA)
    switchable: ClassVar[bool] = False  #: whether the target is back once these factors are switched off
    reads: ClassVar[tuple[Stream, ...]] = ()  #: examples that it looks at before training
    beside: ClassVar[bool] = False  #: whether what is trained stands beside the target, which stays as it is
    joined: ClassVar[bool] = False  #: of what stands beside: what is trained is target and addition as one, which is the result
    extends: ClassVar[frozenset[str]] = (
        frozenset()
    )  #: kinds of composite models to which it can add what a further request learns
    offers: ClassVar[frozenset[Offer]] = frozenset()  #: what it asks of the adapter

    @property
    def apart(self) -> bool:
        """Whether what is trained is a network of its own beside the target."""
        return self.beside and not self.joined

    def memory(self, weights: int) -> int:
        """Bytes that :meth:`begin` needs beside the model, whose weights are so many bytes large; of what it checks itself 0."""
        return 3 * weights if self.reads else 0  # a gradient and two importances of the size of the weights

    def begin(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None = None) -> Any:
        """:meth:`prepare` the adapter's model; a choice that depends on the data looks at them here.

        The result must depend on the arguments alone: a run that goes on after a kill does it again.

        Args:
            adapter: holds the target, on the device of the run, in evaluation mode.
            examples: by stream.
            engine: seed, and examples per forward pass.
            scratch: folder for files that a run that goes on after a kill finds again; it may not exist yet.
            tell: called with what is being done.

        Raises:
            InputError: nothing matches, or a stream that it reads is missing.
        """
        return self.prepare(adapter.model, adapter.layers())

    @abc.abstractmethod
    def prepare(self, model: Any, layers: Sequence[str]) -> Any:
        """Freeze, wrap or mark ``model`` (a torch module) and return the module to train; ``layers`` are block names.

        Raises:
            InputError: nothing matches; the message names some modules that exist.
        """

    def entries(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Which entries of the moving tensors may move, one boolean mask each; none (an empty list) if all may.

        Asked once, after :meth:`prepare`; the gradient elsewhere is set to 0.
        """
        return []

    def undone(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """While open, the prepared model says what the target said; none if preparing it changes nothing that matters to it.

        What training may cost is counted from there.
        """
        return None

    def end(self, model: nn.Module) -> None:
        """Turn what was trained into what is kept; asked once, after training."""


class Penalty(Settings, abc.ABC):
    """A summand of the loss on the weights themselves, by its gradient."""

    name: ClassVar[str]

    def begin(self, adapter: Adapter, model: nn.Module) -> Mapping[str, Any]:
        """What it reads of the target before the first step, by name of a parameter of ``model``, which is to be trained.

        A run that goes on after a kill makes it anew, so it must depend on the arguments alone.
        """
        return {}

    @abc.abstractmethod
    def gradient(self, parameter: Tensor, done: float, made: Any = None) -> Tensor:
        """Gradient of the penalty on one tensor, in its shape.

        Args:
            parameter: the tensor, without its graph.
            done: share of training that is over, in [0, 1).
            made: what :meth:`begin` made for it, if anything.
        """


class Finish(Settings, abc.ABC):
    """What is made of the trained module at the end. Its strength is given, or the smallest that reaches the schedule's goal."""

    name: ClassVar[str]
    accumulates: ClassVar[bool] = (
        False  #: whether what several requests learnt is turned around together, see the engine's finish
    )
    reverses: ClassVar[bool] = True  #: whether it takes away what was learnt: then only what is to be forgotten may be taught
    uses: ClassVar[frozenset[str]] = frozenset()  #: names of things that a preparation must have made
    most: ClassVar[float] = 64.0  #: largest scale at which the schedule looks


class Reweigh(Finish):
    """A change of the weights after training, from those before and after it (task-vector negation)."""

    @abc.abstractmethod
    def weights(self, before: Tensor, after: Tensor, scale: float) -> Tensor:
        """The final value of one float tensor; integer buffers are left alone by the engine."""


class Join(Finish):
    """A model made of the target and of what was trained beside it (an assistant whose scores are subtracted)."""

    takes: ClassVar[tuple[str, ...]] = ()  #: names of the choices of parameters whose result it joins

    @abc.abstractmethod
    def join(self, target: nn.Module, trained: nn.Module, made: Mapping[str, Any]) -> nn.Module:
        """The model that is the result, which holds both, not copies.

        Args:
            target: as it was given.
            trained: the module that is being trained.
            made: what the preparation made, by name.

        Raises:
            InputError: they do not fit together.
        """

    @abc.abstractmethod
    def place(self, joined: nn.Module, scale: float) -> str:
        """Set the strength of what was trained in what :meth:`join` returned; says in one sentence what was set."""


class Schedule(Settings, abc.ABC):
    """How long, how fast and in which portions; see :mod:`expunge.engine.schedule` for the two that exist."""

    name: ClassVar[str]

    batch: int = Field(8, ge=1, description="forget examples per optimiser step, over all processes and micro-batches")
    retain_batch: int | None = Field(None, ge=1, description="retain examples per step; none: as many as forget examples")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="rule of the step")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of earlier directions that goes into a step: beta1 of adamw")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of adamw; of sgd: added to the gradient")
    second_moment: float = Field(0.999, gt=0, lt=1, description="of adamw: share of its mean of squares that a step keeps")
    lr: float | None = Field(None, gt=0, description="learning rate; none: found by a range test")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; none: not clipped")

    @property
    def reads(self) -> frozenset[Stream]:
        """Examples that it looks at, beside those that are trained on."""
        return frozenset()

    @property
    def epochs_over(self) -> Stream:
        """Which set an epoch passes over where there are terms of both sides; the other one is drawn from in turn."""
        return Stream.FORGET

    @abc.abstractmethod
    def total_steps(self, per_epoch: int) -> int:
        """Optimiser steps at most, for an epoch of so many steps."""

    def repair_steps(self, per_pass: int) -> int:
        """Further steps on the retain terms alone, for a pass over the retain set of so many steps."""
        return 0

    def turns(self, names: Sequence[str]) -> list[tuple[frozenset[int], float]]:
        """Which terms (by index of ``names``) are minimised together on the examples of a step, and at which part of the rate.

        With several entries each has an optimiser state of its own and takes its step after the one before.
        """
        return [(frozenset(range(len(names))), 1.0)]


class Recipe(Settings):
    """A weight-updating method: its parts, joined.

    ``loss = c_f * sum_i w_i mean(forget_i) + c_r * sum_j w_j mean(retain_j)`` with the coefficients ``c`` from ``balance``.
    """

    name: str = Field("custom", description="the method it is, or 'custom'")
    forget: tuple[Term, ...] = Field((), description="terms normalised over forget examples")
    retain: tuple[Term, ...] = Field((), description="terms normalised over retain examples")
    reference: Literal["auto", "cached", "adapter-off", "copy"] = Field(
        "auto",
        description="where the frozen target's outputs come from: cached log-probabilities, the model with its LoRA off, "
        "or a second copy; auto takes the first that serves",
    )
    parameters: Parameters
    gradient: Gradient
    balance: Balance
    schedule: Schedule
    preparation: Preparation | None = Field(None, description="what is made from the target and the data before training")
    control: Control | None = Field(None, description="who looks at the forget examples, lets some rest and ends training")
    penalty: Penalty | None = Field(None, description="a summand of the loss on the weights themselves")
    finish: Finish | None = Field(None, description="what is made of the trained weights at the end")
    start: Literal["target", "initial"] = Field("target", description="start from the target, or from its untrained base")

    def terms(self) -> tuple[Term, ...]:
        """All terms, forget first."""
        return (*self.forget, *self.retain)

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Everything that its terms read."""
        return frozenset(n for t in self.terms() for n in t.needs(layers))

    @property
    def looks(self) -> frozenset[Stream]:
        """Examples at which schedule and control look, beside those that are trained on."""
        return self.schedule.reads | (self.control.reads if self.control is not None else frozenset())

    def streams(self, layers: Sequence[str]) -> frozenset[Stream]:
        """The examples that must be given: those that parts read or look at and no preparation makes, and those it reads."""
        read = {t.stream for t in self.terms()} | {stream for stream, _, _ in self.needs(layers)} | self.looks
        read |= set(self.parameters.reads)
        if self.preparation is None:
            return frozenset(read)
        return frozenset((read - {s for s in Stream if s in self.preparation.makes}) | set(self.preparation.reads))

    @property
    def watched(self) -> Targets:
        """On which targets of the forget set its forgetting shows: the marked ones, if a forget term reads these alone."""
        return "marked" if any(t.targets == "marked" for t in self.forget) else "all"

    def models(self, layers: Sequence[str]) -> frozenset[Of]:
        """The models under which the terms read something, other than those that a preparation makes."""
        made = self.preparation.makes if self.preparation is not None else frozenset()
        return frozenset(of for _, of, _ in self.needs(layers) if of not in made)

    def spec(self) -> dict[str, Any]:
        """A plain mapping from which the recipe can be rebuilt; parts are mappings with a ``name``."""
        out: dict[str, Any] = {"name": self.name, "reference": self.reference, "start": self.start}
        for key in ("forget", "retain"):
            out[key] = [{"name": t.name, **t.model_dump(mode="json")} for t in getattr(self, key)]
        for key in ("preparation", "parameters", "gradient", "balance", "schedule", "control", "penalty", "finish"):
            part = getattr(self, key)
            out[key] = None if part is None else {"name": part.name, **part.model_dump(mode="json")}
        return out
