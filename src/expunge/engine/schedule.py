"""Schedules: the adaptive one that works on a model of any size, and the fixed ones of papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.core.registry import Registry
from expunge.engine.parts import Schedule

SCHEDULES: Registry[type[Schedule]] = Registry("schedule", None, "expunge.schedules")


class Fixed(Schedule):
    """A published fixed schedule: optimiser, warm-up, decay, a number of epochs over the forget set."""

    name: ClassVar[str] = "fixed"

    lr: float | None = Field(1e-5, gt=0, description="peak learning rate; none: found by the range test of the adaptive schedule")
    epochs: float | None = Field(10, gt=0, description="passes over the forget set (over the retain set if nothing is forgotten)")
    over: Literal["forget", "retain"] = Field(
        "forget",
        description="which set an epoch passes over, if there are two; the other one is drawn from in turn, again and again",
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    warmup: float = Field(1.0, ge=0, description="epochs of linear warm-up (of steps: share of them, if steps are given)")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="course of the learning rate after warm-up")
    batch: int = Field(32, ge=1, description="forget examples per optimiser step, over all processes and micro-batches")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of adamw; of sgd: added to the gradient")

    @property
    def epochs_over(self) -> Stream:
        """What ``over`` says."""
        return Stream(self.over)

    def total_steps(self, per_epoch: int) -> int:
        """Steps if given, else epochs times ``per_epoch``."""
        return self.steps if self.steps is not None else max(1, math.ceil((self.epochs or 1) * per_epoch))


class Turns(Fixed):
    """Forget and retain terms take turns: in each epoch a pass over the forget set, then one over the retain set.

    Forget passes stop after ``erase_epochs``, the last epochs only repair (as in SCRUB, Kurmanji et al. 2023, arXiv 2302.09880).
    An epoch is a pass over the retain set.
    """

    name: ClassVar[str] = "turns"

    epochs: float | None = Field(3, gt=0, description="passes over the retain set")
    over: Literal["retain"] = Field("retain", description="each epoch ends with a pass over it")
    steps: None = Field(None, description="not used: the passes say how long")
    erase_epochs: int = Field(2, ge=0, description="epochs that begin with a pass over the forget set")
    rewind: bool = Field(
        False,
        description="go back at the end to the epoch whose error on the forget set is nearest to the last one's on unseen rows",
    )
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    decay: Literal["linear", "cosine", "constant"] = Field("constant", description="course of the learning rate after warm-up")

    @property
    def reads(self) -> frozenset[Stream]:
        """Validation rows, to rewind by."""
        return frozenset({Stream.VALIDATION}) if self.rewind else frozenset()


class Repair(Fixed):
    """Forget and retain terms together for the epochs of ``fixed``; then the retain terms alone repair (as in UNSIR)."""

    name: ClassVar[str] = "repair"

    lr: float = Field(1e-4, gt=0, description="peak learning rate of the first part")
    epochs: float | None = Field(1, gt=0, description="passes over the forget set in the first part")
    repair_epochs: float = Field(1, gt=0, description="passes over the retain set in the second part")
    repair_lr: float | None = Field(None, gt=0, description="learning rate of the second part; none: as in the first")
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    decay: Literal["constant"] = Field("constant", description="course of the learning rate after warm-up")

    def repair_steps(self, per_pass: int) -> int:
        """Passes times steps of a pass."""
        return max(1, math.ceil(self.repair_epochs * per_pass))


class Alternate(Fixed):
    """On the examples of every step, groups of terms are minimised one after the other, each by an optimiser of its own."""

    name: ClassVar[str] = "alternate"

    lr: float = Field(1e-5, gt=0, description="peak learning rate of the first group")
    groups: tuple[tuple[str, ...], ...] = Field(
        min_length=1, description="names of the terms in each group, in the order in which they take their steps"
    )
    rates: tuple[float, ...] = Field((), description="learning rate of each group as a multiple of the first; none: all alike")
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up (of steps: share of them, if steps are given)")
    decay: Literal["linear", "cosine", "constant"] = Field("constant", description="course of the learning rate after warm-up")

    def turns(self, names: Sequence[str]) -> list[tuple[frozenset[int], float]]:
        """The groups.

        Raises:
            InputError: a term is in no group or in several, a name is no term's, or there is not one rate for each group.
        """
        named = [name for group in self.groups for name in group]
        for name in {*names, *named}:
            if named.count(name) != 1 or name not in names:
                raise InputError(
                    f"schedule=alternate names {name!r} {named.count(name)} times; the terms are {', '.join(names)}.",
                    "Put each term into one group: schedule.groups=[[a, b], [c]].",
                )
        rates = self.rates or (1.0,) * len(self.groups)
        if len(rates) != len(self.groups) or min(rates) <= 0:
            raise InputError(
                f"schedule=alternate has {len(self.groups)} groups and the rates {list(rates)}.", "Give one positive rate each."
            )
        return [
            (frozenset(i for i, name in enumerate(names) if name in group), rate)
            for group, rate in zip(self.groups, rates, strict=True)
        ]


class Adaptive(Schedule):
    """The default: finds its step size on the model at hand and stops when the forget set looks unseen.

    A short range test tries step sizes in geometric order from a share of the weights' own size and takes the smallest that
    would reach the goal in good time within the utility bound. Then, as measured every few steps:

    * while the mean loss on the forget set is below that of unseen text (the *goal*), the recipe's whole loss is minimised;
    * once it is there, the forget terms pause, and the retain terms alone go on until the loss on the retain set is within
      its bound; if that brings the forget set back, the forget terms resume;
    * training ends when both hold (*goal*), when the retain loss cannot be held within its bound (*utility*: without a retain
      term at the first crossing, with one after going back to the last good weights at a third of the rate, twice), or when
      the budget is spent (*budget*). The run says which.
    """

    name: ClassVar[str] = "adaptive"

    lr: float | None = Field(None, gt=0, description="learning rate; none: found by the range test")
    epochs: float = Field(20, gt=0, description="budget: passes over the forget set, if they are more than 'steps'")
    steps: int = Field(400, ge=1, description="budget in optimiser steps, if they are more than 'epochs'")
    utility_bound: float = Field(0.1, gt=0, description="largest accepted rise of the retain loss per target, in nats")
    transient: float = Field(
        0.9,
        ge=0,
        description="rise of the retain loss that a retain term may win back on the way, as a share of the forget set's rise",
    )
    check_every: int = Field(5, ge=1, description="steps between checks of the goal and the bound; every step once it is near")
    check_examples: int = Field(128, ge=4, description="examples of each side that a check looks at, at most")

    def total_steps(self, per_epoch: int) -> int:
        """The larger of both budgets."""
        return max(self.steps, math.ceil(self.epochs * per_epoch))


SCHEDULES.add("fixed", Fixed)
SCHEDULES.add("adaptive", Adaptive)
SCHEDULES.add("turns", Turns)
SCHEDULES.add("alternate", Alternate)
SCHEDULES.add("repair", Repair)
