"""Schedules: the adaptive one that works on a model of any size, and the fixed ones of papers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from expunge.core.registry import Registry
from expunge.engine.parts import Schedule

SCHEDULES: Registry[type[Schedule]] = Registry("schedule", None, "expunge.schedules")


class Fixed(Schedule):
    """A published fixed schedule: AdamW, warm-up, decay, a number of epochs over the forget set."""

    name: ClassVar[str] = "fixed"

    lr: float | None = Field(1e-5, gt=0, description="peak learning rate; none: found by the range test of the adaptive schedule")
    epochs: float | None = Field(10, gt=0, description="passes over the forget set (over the retain set if nothing is forgotten)")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    warmup: float = Field(1.0, ge=0, description="epochs of linear warm-up (of steps: share of them, if steps are given)")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="course of the learning rate after warm-up")
    batch: int = Field(32, ge=1, description="forget examples per optimiser step, over all processes and micro-batches")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of AdamW")


class Adaptive(Schedule):
    """The default: finds its step size on the model at hand and stops when the forget set looks unseen.

    A short range test tries step sizes in geometric order from a share of the weights' own size and takes the one that
    forgets fastest within the utility bound. Training then stops at the first of: the mean loss per example on the forget
    set reaches that of unseen text (*goal*); the loss on the retain set rises past its bound (*utility*); the budget of
    epochs is spent (*budget*). The run says which.
    """

    name: ClassVar[str] = "adaptive"

    lr: float | None = Field(None, gt=0, description="learning rate; none: found by the range test")
    epochs: float = Field(40, gt=0, description="budget: passes over the forget set")
    utility_bound: float = Field(0.1, gt=0, description="largest accepted rise of the retain loss per target, in nats")
    check_every: int = Field(5, ge=1, description="steps between checks of the goal and the bound")
    check_examples: int = Field(128, ge=4, description="examples of each side that a check looks at, at most")


SCHEDULES.add("fixed", Fixed)
SCHEDULES.add("adaptive", Adaptive)
