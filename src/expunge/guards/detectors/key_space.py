"""Key Space Detection: a request that leaves a key within the box of a skill's own keys asks for that skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from expunge.core.errors import InputError
from expunge.guards.parts import Detector, Hit, Hook, Material, Reading, Watcher, detector
from expunge.guards.probing import Form, probe_ids, probe_states, units_of
from expunge.guards.target import Target

_NAME = "Key Space Detection"


@dataclass(frozen=True)
class Box:
    """Where the keys of a skill lie: ``|x - mean| <= k std`` in every dimension, float64 ``[D]``.

    ``k`` is the least factor with which all keys that it was made from lie inside: the largest standardised deviation of any of
    them in any dimension.
    """

    mean: Tensor
    std: Tensor
    k: float

    @classmethod
    def around(cls, keys: Tensor) -> Box:
        """The box of keys ``[n, D]``, ``n`` at least 2."""
        mean, std = keys.mean(0), keys.std(0)
        # A unit that never moves has a width of rounding errors, not of zero: another batch may round in another way.
        std = std.clamp(min=1e-6 * float(keys.abs().max().clamp(min=1e-12)))
        return cls(mean, std, float(((keys - mean).abs() / std).max()))

    def reach(self, keys: Tensor) -> Tensor:
        """By which factor the box must be stretched to hold each of the keys ``[n, D]``: ``[n]``; at most 1 for its own."""
        return ((keys - self.mean).abs() / (self.k * self.std)).amax(-1)


@detector
class KeySpace(Detector):
    r"""Fires when the last token of a prompt leaves a key inside the box of a skill's keys (Li et al. 2025, arXiv 2503.21730).

    The key is the input of the down projection of a feed-forward layer, ``d_ff`` numbers. With ``mu`` and ``s`` the mean and the
    standard deviation of the probes' keys (``ddof = 1``) and ``k = max |x - mu| / s`` over probes and dimensions, a prompt hits
    if ``|x - mu| <= alpha k s`` in every dimension, at every chosen block. ``k`` follows from the probes' farthest key, so
    ``alpha`` cannot be compared between skills: the paper's are 2 (GSM8K), 1.4 (MBPP) and 0.06 (languages).

    The official code looks for ``k`` by bisection (the same number), and tests row 0 of a batch at every forward pass, one hit
    of which makes refusals of all; here each request is tested once, when its prompt has been read. Whether a probe gives one
    key or one for each of its tokens is a setting, ``keys``: what is tested is the key of a last token.
    """

    name: ClassVar[str] = "key-space"
    title: ClassVar[str] = _NAME
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.HIDDEN})

    alpha: float = Field(1.0, gt=0, description="by which the box of the probes is stretched")
    blocks: tuple[str, ...] = Field(("last",), min_length=1, description="blocks whose keys are looked at, or 'last'")
    keys: Literal["last", "all"] = Field("last", description="of a probe: the key of its last token, or of all its tokens")
    probes: Form = Field("requests", description="how probes are read: as questions of a user, or as texts as they are")

    @field_validator("blocks", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def fit(self, material: Material) -> Watcher:
        """A box for every skill that there are probes of, at each block.

        Raises:
            InputError: a target has a skill without probes, or there is no such block.
        """
        adapter = material.model(_NAME)
        blocks = [adapter.layers()[-1] if b == "last" else b for b in self.blocks]
        places = [u.output for u in units_of(adapter, blocks)]
        boxes = {skill: self._boxes(material, skill, places) for skill in material.probes if skill}
        made = KeyWatcher(boxes, places, self.alpha)
        for target in material.targets:
            made.add(target)
        return made

    def _boxes(self, material: Material, skill: str, places: Sequence[str]) -> dict[str, Box]:
        ids = probe_ids(material, skill, self.probes, _NAME)
        held: dict[str, list[Tensor]] = {p: [] for p in places}
        for states in probe_states(material.model(_NAME), ids, [(p, "input") for p in places]):
            for name, rows in states.items():
                held[name].append(rows[-1:] if self.keys == "last" else rows)
        return {name: Box.around(torch.cat(rows)) for name, rows in held.items()}


class KeyWatcher(Watcher):
    """Tests keys.

    Args:
        boxes: by skill and module.
        places: modules whose inputs are keys.
        alpha: stretches the boxes.
    """

    def __init__(self, boxes: Mapping[str, Mapping[str, Box]], places: Sequence[str], alpha: float) -> None:
        self.boxes, self.alpha = boxes, alpha
        self.readings = tuple(Reading(p, "input", "last") for p in places)
        self.skills: dict[str, tuple[str, ...]] = {}

    def add(self, target: Target) -> None:
        """Look for its skills; one without skills is none of this detector's."""
        known_skills(target, self.boxes)
        self.skills = {**self.skills, target.id: target.skills}

    def drop(self, target: str) -> None:
        """Look for them no more."""
        self.skills = {k: v for k, v in self.skills.items() if k != target}

    def hidden(self, states: Mapping[Reading, Tensor]) -> list[Hit]:
        """Targets whose boxes hold the key. The score is 1 in the middle of a box, 0 at the farthest probe, and less outside."""
        out = []
        for target, skills in self.skills.items():
            reach = min((self._reach(s, states) for s in skills), default=float("inf"))
            if reach <= self.alpha:
                out.append(Hit(target, 1.0 - reach))
        return out

    def _reach(self, skill: str, states: Mapping[Reading, Tensor]) -> float:
        return max(float(self.boxes[skill][r.module].reach(states[r].double()[None])) for r in self.readings)


def known_skills(target: Target, known: Mapping[str, object]) -> None:
    """Refuse a target with a skill that was not probed.

    Raises:
        InputError: it has one.
    """
    if missing := next((s for s in target.skills if s not in known), None):
        raise InputError(
            f"There are no probe texts of the skill {missing!r}.",
            f"Give them under probes when the guard is made; there are those of: {', '.join(known) or 'none'}.",
        )
