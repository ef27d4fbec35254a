"""Neuron Adjust: units that rise for a skill are moved to where they are for everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from expunge.guards.conversation import Conversation
from expunge.guards.parts import Action, Doer, HiddenEdit, Hit, Hook, Material, Orders, Probe, action
from expunge.guards.probing import Form, Moments, moments, probe_ids, probes_of, skills_of, units_of
from expunge.guards.target import Target

_NAME = "Neuron Adjust"
_LEAST = 1e-6  #: width of a distribution that has none


@dataclass(frozen=True)
class Adjusted:
    """Chosen units of one module, all ``[n]``: their indices, both distributions, and by how much they differ."""

    units: Tensor
    mean: Tensor
    std: Tensor
    forget_mean: Tensor
    forget_std: Tensor
    difference: Tensor

    def moved(self, values: Tensor, uniforms: Tensor) -> Tensor:
        """Pre-activations ``[..., n]`` after the adjustment; ``uniforms`` in [0, 1), of the same shape, decide.

        A value at which the density of what stays is the greater is left. Another is replaced with probability
        ``p2 / (p1 + p2)`` by ``mu1 - s1 (x - mu2) / s2``: carried over to the distribution of what stays, and mirrored there.
        """
        z1, z2 = (values - self.mean) / self.std, (values - self.forget_mean) / self.forget_std
        gap = (z1**2 - z2**2) / 2 + self.std.log() - self.forget_std.log()  # log p2 - log p1
        taken = (gap >= 0) & (uniforms < torch.sigmoid(gap))
        return torch.where(taken, self.mean - self.std * z2, values)


@action
class NeuronAdjust(Action):
    r"""Shifts pre-activations of units that tell a skill from what is to stay (Li et al. 2025, arXiv 2503.21730).

    Probe texts give, for every unit, mean and standard deviation of its pre-activation (the output of the gate projection; of
    the first projection where there is no gate) over all tokens: ``mu1, s1`` for what stays, ``mu2, s2`` for the skill. The
    ``share`` of all units that differ the most is chosen. At every token a chosen value ``x`` with ``N(x; mu1, s1) > N(x; mu2,
    s2)`` is kept; else it becomes ``mu1 - s1 (x - mu2) / s2`` with probability ``p2 / (p1 + p2)``.

    The formula is followed, not the official code, which takes a variance for the deviation, makes that of the skill from its
    mean, draws one number for all tokens and units, and by default reads the input of the down projection. As there, units are
    chosen by how much they rise (``mu2 - mu1``); ``standardised`` chooses by the distance in deviations, whichever its sign.

    What is drawn follows from the guard's key, the request, the unit and the token's place: asking again does not average it out.
    """

    name: ClassVar[str] = "neuron-adjust"
    title: ClassVar[str] = _NAME
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.HIDDEN})
    probed: ClassVar[frozenset[Probe]] = frozenset(Probe)

    share: float = Field(
        0.03, gt=0, le=1, description="of all units, how many are adjusted (the paper: 0.03, for languages 0.005)"
    )
    difference: Literal["rise", "standardised"] = Field(
        "rise", description="by what units are chosen: by mu2 - mu1, or by |mu2 - mu1| / sqrt(s1^2 + s2^2)"
    )
    probes: Form = Field("texts", description="how probes are read: as questions of a user, or as texts as they are")

    def prepare(self, material: Material) -> Doer:
        """Find the units of every skill that there are probes of.

        Raises:
            InputError: no probes of what is to stay, or a target has a skill without probes.
        """
        adapter = material.model(_NAME)
        units = units_of(adapter, adapter.layers())
        places: list[tuple[str, Literal["input", "output"]]] = [(u.gate, "output") for u in units]
        counts = {u.gate: u.count for u in units}
        stays = moments(adapter, probe_ids(adapter, material.probes.get("", ()), self.probes, _NAME), places)
        skills = {}
        for skill, texts in probes_of(material).items():
            found = moments(adapter, probe_ids(adapter, texts, self.probes, _NAME, skill), places)
            skills[skill] = self._chosen(stays, found, counts)
        made = _Adjusts(skills, material.key)
        for target in material.targets:
            made.add(target)
        return made

    def gaps(self, stays: Moments, skill: Moments) -> Tensor:
        """By how much each dimension of a module tells a skill from what stays, ``[D]``: the greatest are chosen."""
        gap = skill.mean - stays.mean
        return gap if self.difference == "rise" else gap.abs() / (stays.std**2 + skill.std**2).sqrt().clamp(min=_LEAST)

    def _chosen(
        self, stays: Mapping[str, Moments], skill: Mapping[str, Moments], counts: Mapping[str, int]
    ) -> dict[str, Adjusted]:
        gaps = {}
        for name, count in counts.items():
            gaps[name] = self.gaps(stays[name], skill[name])[:count]
        every = torch.cat(list(gaps.values()))
        least = every.topk(max(1, round(self.share * len(every)))).values[-1]
        out = {}
        for name, gap in gaps.items():
            at = (gap >= least).nonzero()[:, 0]
            a, b = stays[name], skill[name]
            if len(at):
                out[name] = Adjusted(
                    at, a.mean[at], a.std[at].clamp(min=_LEAST), b.mean[at], b.std[at].clamp(min=_LEAST), gap[at]
                )  # fmt: skip
        return out


class _Adjusts(Doer):
    def __init__(self, skills: Mapping[str, Mapping[str, Adjusted]], key: bytes) -> None:
        self.units, self.key = skills, key
        self.skills: dict[str, tuple[str, ...]] = {}
        self._merged = lru_cache(maxsize=64)(self._merge)

    def covers(self, target: Target) -> bool:
        """Whether it is about a skill."""
        return bool(skills_of(target, self.units))

    def add(self, target: Target) -> None:
        self.skills = {**self.skills, target.id: skills_of(target, self.units)}

    def drop(self, target: str) -> None:
        self.skills = {k: v for k, v in self.skills.items() if k != target}

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        """Adjust the units of the targets that were noticed, or of all where it is not known which."""
        held = self.skills
        noticed = set(held) if any(not h.target for h in hits) else {h.target for h in hits}
        wanted = frozenset(s for t in noticed for s in held.get(t, ()))
        seed = _seed(self.key, conversation)
        return Orders(
            hidden=tuple(
                HiddenEdit(name, "output", partial(_changed, adjusted, seed, number))
                for number, (name, adjusted) in enumerate(sorted(self._merged(wanted).items()))
            )
        )

    def _merge(self, wanted: frozenset[str]) -> dict[str, Adjusted]:
        """Units of several skills; one that belongs to more than one is adjusted for that for which it differs most."""
        by_name: dict[str, list[Adjusted]] = {}
        for skill in sorted(wanted):
            for name, adjusted in self.units[skill].items():
                by_name.setdefault(name, []).append(adjusted)
        return {name: parts[0] if len(parts) == 1 else _joined(parts) for name, parts in by_name.items()}


def _joined(parts: Sequence[Adjusted]) -> Adjusted:
    fields = ("units", "mean", "std", "forget_mean", "forget_std", "difference")
    every = {f: torch.cat([getattr(p, f) for p in parts]) for f in fields}
    best: dict[int, int] = {}
    for at, (unit, gap) in enumerate(zip(every["units"].tolist(), every["difference"].tolist(), strict=True)):
        if unit not in best or gap > float(every["difference"][best[unit]]):
            best[unit] = at
    kept = torch.tensor([best[u] for u in sorted(best)])
    return Adjusted(**{f: v[kept] for f, v in every.items()})


def _changed(adjusted: Adjusted, seed: int, number: int, states: Tensor, first: int) -> Tensor:
    drawn = torch.from_numpy(uniforms(seed, number, first, len(states), len(adjusted.units)))
    units = adjusted.units.to(states.device)
    values = states[:, units].double().cpu()
    out = states.clone()
    out[:, units] = adjusted.moved(values, drawn).to(out)
    return out


def _seed(key: bytes, conversation: Conversation) -> int:
    said = json.dumps([[m.role, m.content] for m in conversation.messages]).encode()
    found = hashlib.blake2b(said, key=hashlib.sha256(key).digest(), digest_size=8, person=b"neuron-adjust")
    return int.from_bytes(found.digest(), "big")


def uniforms(seed: int, number: int, first: int, tokens: int, units: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) for places from ``first`` on, ``[tokens, units]``: the same for a place however it is reached.

    Args:
        seed: of the request, below 2^64.
        number: of the module.
        first: place of the first token.
        tokens: how many.
        units: of the module.
    """
    blocks = -(-units // 4)  # Philox makes four numbers a step, and can be set to any step
    bits = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).advance(first * blocks)
    raw = np.asarray(bits.random_raw(tokens * blocks * 4), dtype=np.uint64).reshape(tokens, blocks * 4)[:, :units]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
