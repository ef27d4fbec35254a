"""The parts of which a weight-updating method is composed, and the recipe that joins them.

    preparation x forget terms x retain terms x reference x parameters x gradient x balance x schedule x penalty x finish

Every part is a :class:`~expunge.core.settings.Settings`: immutable, typed, with declared ranges, usable from Python, YAML
and the command line alike.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Example, Outputs
from expunge.core.access import Of, Offer, Stream
from expunge.core.settings import Settings
from expunge.engine.preparation import Preparation

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


class Term(Settings, abc.ABC):
    """One summand of the loss, written on per-target quantities.

    A term returns one value per target, example or token; the engine sums and divides by the count over the *whole*
    optimiser step (all micro-batches, all processes), so accumulation and distribution never change the result.
    """

    name: ClassVar[str]  #: registered name
    per: ClassVar[Literal["target", "example", "token"]] = "target"  #: what a value belongs to, and is averaged over
    uses: ClassVar[frozenset[str]] = frozenset()  #: names of things that a preparation must have made
    whole: ClassVar[bool] = False  #: whether its value is one of a whole step, which then must fit into one forward pass
    reverse: ClassVar[bool] = False  #: whether it teaches what is to be taken away again: only before a finish that does so

    weight: float = Field(1.0, ge=0, description="coefficient of the term in the loss")

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

    def count(self, examples: Sequence[Example]) -> int:
        """By how much the sum of values is divided, for the examples of one optimiser step (all processes together)."""
        if self.per == "example":
            return len(examples)
        if self.per == "token":
            return sum(e.size for e in examples)
        return sum(e.n_targets for e in examples)


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

    @abc.abstractmethod
    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
        """One gradient per trainable tensor from the (already weighted and normalised) forget and retain gradients.

        ``state`` is the rule's memory between steps (tensors or numbers only: it is saved in checkpoints).
        """


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
    beside: ClassVar[bool] = False  #: whether what is trained stands beside the target, which stays as it is
    offers: ClassVar[frozenset[Offer]] = frozenset()  #: what it asks of the adapter

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


class Penalty(Settings, abc.ABC):
    """A summand of the loss on the weights themselves, by its gradient."""

    name: ClassVar[str]

    @abc.abstractmethod
    def gradient(self, parameter: Tensor, done: float) -> Tensor:
        """Gradient of the penalty on one tensor, in its shape; ``done`` in [0, 1) is the share of training that is over."""


class Finish(Settings, abc.ABC):
    """What is made of the trained module at the end. Its strength is given, or the smallest that reaches the schedule's goal."""

    name: ClassVar[str]


class Reweigh(Finish):
    """A change of the weights after training, from those before and after it (task-vector negation)."""

    @abc.abstractmethod
    def weights(self, before: Tensor, after: Tensor, scale: float) -> Tensor:
        """The final value of one float tensor; integer buffers are left alone by the engine."""


class Join(Finish):
    """A model made of the target and of what was trained beside it (an assistant whose scores are subtracted)."""

    @abc.abstractmethod
    def join(self, target: nn.Module, trained: nn.Module) -> nn.Module:
        """The model that is the result, which holds both, not copies.

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
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd: share of the last step that is taken again")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of adamw; of sgd: added to the gradient")
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
    penalty: Penalty | None = Field(None, description="a summand of the loss on the weights themselves")
    finish: Finish | None = Field(None, description="what is made of the trained weights at the end")
    start: Literal["target", "initial"] = Field("target", description="start from the target, or from its untrained base")

    def terms(self) -> tuple[Term, ...]:
        """All terms, forget first."""
        return (*self.forget, *self.retain)

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Everything that its terms read."""
        return frozenset(n for t in self.terms() for n in t.needs(layers))

    def streams(self, layers: Sequence[str]) -> frozenset[Stream]:
        """The examples that must be given: those that terms and schedule read and no preparation makes, and those it reads."""
        read = {t.stream for t in self.terms()} | {stream for stream, _, _ in self.needs(layers)} | self.schedule.reads
        if self.preparation is None:
            return frozenset(read)
        return frozenset((read - {s for s in Stream if s in self.preparation.makes}) | set(self.preparation.reads))

    def models(self, layers: Sequence[str]) -> frozenset[Of]:
        """The models under which the terms read something, other than those that a preparation makes."""
        made = self.preparation.makes if self.preparation is not None else frozenset()
        return frozenset(of for _, of, _ in self.needs(layers) if of not in made)

    def spec(self) -> dict[str, Any]:
        """A plain mapping from which the recipe can be rebuilt; parts are mappings with a ``name``."""
        out: dict[str, Any] = {"name": self.name, "reference": self.reference, "start": self.start}
        for key in ("forget", "retain"):
            out[key] = [{"name": t.name, **t.model_dump(mode="json")} for t in getattr(self, key)]
        for key in ("preparation", "parameters", "gradient", "balance", "schedule", "penalty", "finish"):
            part = getattr(self, key)
            out[key] = None if part is None else {"name": part.name, **part.model_dump(mode="json")}
        return out
