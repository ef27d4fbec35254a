"""Key Space Detection: a request that leaves a key within the box of a skill's own keys asks for that skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from expunge.guards.conversation import Conversation
from expunge.guards.parts import Detector, Hit, Hook, Material, Probe, Reading, Watcher, detector
from expunge.guards.probing import Form, probe_ids, probe_states, probes_of, skills_of, units_of
from expunge.guards.prompts import put
from expunge.guards.target import Target

if TYPE_CHECKING:
    from expunge.adapters.language import LanguageAdapter

_NAME = "Key Space Detection"
_HALVES = 8  #: probes from which on one half's box says something of the other
_MOST = 512  #: ordinary prompts that are looked at


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
    probed: ClassVar[frozenset[Probe]] = frozenset({Probe.SKILL})

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
        boxes, tested = {}, {}
        for skill, texts in probes_of(material).items():
            keys = self._keys(adapter, probe_ids(adapter, texts, self.probes, _NAME, skill), places)
            boxes[skill] = {name: Box.around(torch.cat(rows)) for name, rows in keys.items()}
            tested[skill] = self._outside(keys, material.seed)
        asked = [_asked(adapter, p) for p in material.ordinary[:_MOST]]
        passing = self._keys(adapter, asked, places) if asked else {}
        ordinary = {name: torch.cat([r[-1:] for r in rows]) for name, rows in passing.items()}
        made = KeyWatcher(boxes, places, self.alpha, tested, ordinary)
        for target in material.targets:
            made.add(target)
        return made

    def _keys(self, adapter: LanguageAdapter, ids: Sequence[NDArray[np.int64]], places: Sequence[str]) -> dict[str, list[Tensor]]:
        """Keys of texts, ``[1, D]`` or one for each token, by module."""
        held: dict[str, list[Tensor]] = {p: [] for p in places}
        for states in probe_states(adapter, ids, [(p, "input") for p in places]):
            for name, rows in states.items():
                held[name].append(rows[-1:] if self.keys == "last" else rows)
        return held

    def _outside(self, keys: Mapping[str, Sequence[Tensor]], seed: int) -> tuple[int, int]:
        """Of probes, how many lie outside the box of the other half, and how many there are; 0 of 0 where halves are no box."""
        count = len(next(iter(keys.values())))
        if count < _HALVES:
            return 0, 0
        order = np.random.default_rng([seed, 17]).permutation(count)
        outside = 0
        for own, others in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            boxes = {name: Box.around(torch.cat([rows[i] for i in others])) for name, rows in keys.items()}
            last = {name: torch.cat([rows[i][-1:] for i in own]) for name, rows in keys.items()}
            outside += int((_reach(boxes, last) > self.alpha).sum())
        return outside, count


class KeyWatcher(Watcher):
    """Tests keys.

    Args:
        boxes: by skill and module.
        places: modules whose inputs are keys.
        alpha: stretches the boxes.
        outside: of each skill's probes, how many lie outside the box of their other half, and how many they are.
        ordinary: keys of ordinary prompts, of which no box was made, ``[n, D]`` by module.
    """

    def __init__(
        self,
        boxes: Mapping[str, Mapping[str, Box]],
        places: Sequence[str],
        alpha: float,
        outside: Mapping[str, tuple[int, int]] | None = None,
        ordinary: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.boxes, self.alpha = boxes, alpha
        self.outside, self.ordinary = outside or {}, ordinary or {}
        self.readings = tuple(Reading(p, "input", "last") for p in places)
        self.skills: dict[str, tuple[str, ...]] = {}

    @property
    def promise(self) -> str:
        """What was counted when it was fitted: what passes of the skills that are hidden now, and what else is noticed."""
        hidden = sorted({s for skills in self.skills.values() for s in skills})
        missed, probes = (sum(self.outside.get(s, (0, 0))[i] for s in hidden) for i in (0, 1))
        said = []
        if probes:
            said.append(f"Of {probes} probe texts {missed} lie outside the box of the others: as many new ones may pass.")
        if self.ordinary and hidden:
            count = len(next(iter(self.ordinary.values())))
            reach = torch.stack([_reach(self.boxes[s], self.ordinary) for s in hidden]).amin(0)
            within = int((reach <= self.alpha).sum())
            said.append(f"Of {count} ordinary prompts, of which no box was made, {within} lie within a box and are refused.")
        return " ".join(said)

    def covers(self, target: Target) -> bool:
        """Whether it is about a skill."""
        return bool(skills_of(target, self.boxes))

    def add(self, target: Target) -> None:
        """Look for its skills; one without skills is none of this detector's."""
        self.skills = {**self.skills, target.id: skills_of(target, self.boxes)}

    def drop(self, target: str) -> None:
        """Look for them no more."""
        self.skills = {k: v for k, v in self.skills.items() if k != target}

    def hidden(self, states: Mapping[Reading, Tensor]) -> list[Hit]:
        """Targets whose boxes hold the key. The score is 1 in the middle of a box, 0 at the farthest probe, and less outside."""
        out = []
        for target, skills in self.skills.items():
            keys = {r.module: states[r].double()[None] for r in self.readings}
            reach = min((float(_reach(self.boxes[s], keys)) for s in skills), default=float("inf"))
            if reach <= self.alpha:
                out.append(Hit(target, 1.0 - reach))
        return out


def _reach(boxes: Mapping[str, Box], keys: Mapping[str, Tensor]) -> Tensor:
    """By which factor boxes must be stretched so that each hold its module's key of each text: ``[n]``."""
    return torch.stack([box.reach(keys[name]) for name, box in boxes.items()]).amax(0)


def _asked(adapter: LanguageAdapter, prompt: str) -> NDArray[np.int64]:
    return put(adapter, Conversation.of(prompt)).ids[: adapter.context]
