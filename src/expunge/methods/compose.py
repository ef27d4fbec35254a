"""Joining parts to a recipe in code, with the defaults that every method shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from expunge.engine.balance import FixedBalance
from expunge.engine.control import Control
from expunge.engine.gradient import Plain
from expunge.engine.parameters import AllParameters
from expunge.engine.parts import Balance, Finish, Gradient, Parameters, Penalty, Recipe, Schedule, Term
from expunge.engine.preparation import Preparation
from expunge.engine.schedule import Adaptive


def compose(
    name: str = "custom",
    *,
    forget: Sequence[Term] = (),
    retain: Sequence[Term] = (),
    preparation: Preparation | None = None,
    parameters: Parameters | None = None,
    gradient: Gradient | None = None,
    balance: Balance | None = None,
    schedule: Schedule | None = None,
    control: Control | None = None,
    penalty: Penalty | None = None,
    finish: Finish | None = None,
    reference: Literal["auto", "cached", "adapter-off", "copy"] = "auto",
    start: Literal["target", "initial"] = "target",
) -> Recipe:
    """A recipe of the given parts; the rest is: all parameters, plain gradient, fixed balance, adaptive schedule."""
    return Recipe(
        name=name,
        forget=tuple(forget),
        retain=tuple(retain),
        reference=reference,
        preparation=preparation,
        parameters=parameters or AllParameters(),
        gradient=gradient or Plain(),
        balance=balance or FixedBalance(),
        schedule=schedule or Adaptive(),
        control=control,
        penalty=penalty,
        finish=finish,
        start=start,
    )
