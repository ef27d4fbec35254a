"""Guards as results of a run: planned, fitted, opened again and audited as methods that change weights are."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, write_json
from expunge.core.settings import Settings
from expunge.data.records import Record, RecordSet
from expunge.engine.devices import peak_bytes
from expunge.engine.outcome import Outcome
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import Guarded
from expunge.guards.named import GUARDS, rows_of
from expunge.guards.parts import Material, Probe
from expunge.guards.policy import Policy, Row
from expunge.guards.probing import LEAST
from expunge.guards.request import skills_in, targets_of
from expunge.guards.target import Target

FILE = "guard.json"
KEY = "guard.key"
_SCHEMA = 1


class Shield(Settings):
    """A guard as the method of a run."""

    name: ClassVar[str] = "guard"

    method: str = Field(description="name of the guard")
    rows: tuple[Row, ...] = Field(description="its detectors and actions")

    @property
    def probed(self) -> frozenset[Probe]:
        """What texts are read of when it is fitted."""
        return frozenset().union(*(r.probed for r in self.rows))

    def spec(self) -> dict[str, Any]:
        """What it is, with all settings."""
        return {"name": self.method, "rows": [r.described() for r in self.rows]}


def is_guard(method: str) -> bool:
    """Whether a method is a guard."""
    return method in GUARDS.names()


def shield(method: str, parts: Mapping[str, Any]) -> Shield:
    """A guard with settings that differ from its own (``action.text=...``).

    Raises:
        InputError: a setting that it does not have.
    """
    flat = {f"{k}.{n}" if isinstance(v, Mapping) else k: w for k, v in parts.items() for n, w in _items(v)}
    return Shield(method=method, rows=tuple(rows_of({"guard": method, **flat})))


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [("", value)]


@dataclass(frozen=True)
class Origin:
    """What a guarded run must find again to be opened."""

    target: str
    digest: str
    data: Mapping[str, str]


def half_of(retain: RecordSet | None, seed: int) -> list[Record]:
    """One half of the retain set by clusters, which guards are fitted on; an audit judges by the other half too."""
    if retain is None:
        return []
    clusters = sorted(set(retain.clusters()))
    order = torch.randperm(len(clusters), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {clusters[i] for i in order[: (len(clusters) + 1) // 2]}
    return [r for r in retain if r.cluster in chosen]


def check_retain(shield: Shield, given: bool) -> None:
    """Refuse a guard that reads texts of what is to stay, without any.

    Raises:
        InputError: it does, and no retain set was given.
    """
    if Probe.KEPT in shield.probed and not given:
        said = f"The guard {shield.method!r} reads texts of what is to stay, and no retain set was given."
        raise InputError(said, "Give --retain DATA.")


def hidden_by(
    shield: Shield, forget: RecordSet, retain: RecordSet | None, seed: int
) -> tuple[list[Target], dict[str, Sequence[Record]]]:
    """What a guard hides of the records of a request, and the records that it reads of each skill (``""``: of what is to stay).

    A guard of skills hides the skill that the forget records show: they are its probes. All others hide subjects.

    Raises:
        InputError: too few records for a guard that reads texts of skills.
    """
    check_retain(shield, retain is not None)
    targets: list[Target] = []
    probes: dict[str, Sequence[Record]] = {}
    if any(Probe.SKILL not in row.probed for row in shield.rows):
        targets += targets_of(forget.records, retain.records if retain is not None else ())
    if Probe.SKILL in shield.probed:
        probes |= skills_in(forget.records)
        targets += [Target(id=name, skills=(name,)) for name in probes]
    if Probe.KEPT in shield.probed:
        probes[""] = half_of(retain, seed)
        if len(probes[""]) < LEAST:
            raise InputError(
                f"Of the retain set one half is read, {len(probes[''])} records, and {LEAST} tell what is to stay.",
                f"Give {2 * LEAST} or more, in at least two subjects.",
            )
    return targets, probes


def fit(
    adapter: LanguageAdapter,
    shield: Shield,
    forget: RecordSet,
    retain: RecordSet | None,
    *,
    key: bytes,
    seed: int,
    origin: Origin,
) -> SavedGuard:
    """Fit a guard to the records of a request.

    Raises:
        InputError: the records do not hold what a part of it needs.
    """
    targets, probes = hidden_by(shield, forget, retain, seed)
    half = half_of(retain, seed)
    prompts, groups = [r.prompt or r.answer for r in half], [r.cluster for r in half]
    material = Material(
        targets=targets, ordinary=prompts, groups=groups, key=key, adapter=adapter, seed=seed, probes=probes
    )  # fmt: skip
    return SavedGuard(Guarded(adapter, Policy(shield.rows, material)), shield, origin, seed)


class SavedGuard(GuardedAdapter):
    """A guarded model that can be written as the result of a run: what it is made of, never what it hides.

    Args:
        guarded: model and guards.
        shield: the guard, unfitted.
        origin: where model and records are.
        seed: that it was fitted with.
    """

    def __init__(self, guarded: Guarded, shield: Shield, origin: Origin, seed: int) -> None:
        super().__init__(guarded)
        self.shield, self.origin, self.seed = shield, origin, seed

    def save(  # type: ignore[override]
        self, folder: Path, model: nn.Module | None = None, *, merge: bool = False, state: dict[str, Tensor] | None = None
    ) -> None:
        """Write ``guard.json`` and its key (readable by its owner alone); the records stay where they are."""
        with atomic_path(Path(folder)) as place:
            place.mkdir()
            handle = os.open(place / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(self.guarded.policy.material.key)
            said = {"schema": _SCHEMA, "kind": "guarded", "seed": self.seed, **self.shield.spec()}
            held = {"target": {"source": self.origin.target, "digest": self.origin.digest}, "data": dict(self.origin.data)}
            write_json(place / FILE, {**said, **held})


def apply_guard(
    adapter: LanguageAdapter, shield: Shield, forget: RecordSet, retain: RecordSet | None, *, seed: int, target: str
) -> tuple[SavedGuard, Outcome]:
    """Put a guard before a model; no weight changes.

    Raises:
        InputError: the records do not hold what a part of it needs.
    """
    started = time.perf_counter()
    data = {n: r.digest for n, r in (("forget", forget), ("retain", retain)) if r is not None}
    origin = Origin(target, adapter.fingerprint(), data)
    made = fit(adapter, shield, forget, retain, key=secrets.token_bytes(32), seed=seed, origin=origin)
    names = sum(len(t.entities) for t in made.guarded.targets.values())
    sentence = f"Put the guard {shield.method} before the model: {_counted(made.guarded, names)}. No weight has changed."
    notes = ["A guard hides and does not remove: the weights hold what they held. No audit can call it forgotten."]
    notes += [f"{title}: {promise}" for title, promise in made.guarded.policy.promises.items()]
    if not names and any(r.detector.name == "terms" for r in shield.rows):
        notes.append("No names were found in the records: a guard that matches names hides nothing of them.")
    outcome = Outcome(
        adapter.model, "edited", sentence, 0, 0.0, seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(next(adapter.model.parameters()).device), notes=notes,
    )  # fmt: skip
    return made, outcome


def _counted(guarded: Guarded, names: int) -> str:
    """What is hidden, in numbers."""
    targets, probes = guarded.targets.values(), guarded.policy.material.probes
    skills, said = {s for t in targets for s in t.skills}, []
    if subjects := sum(not t.skills for t in targets):
        said.append(f"{subjects} subjects, {names} names")
    if skills:
        said.append(f"{len(skills)} skill{'s' * (len(skills) > 1)} of {sum(len(probes[s]) for s in skills)} probe texts")
    return ", ".join(said)


def is_guarded(folder: Path) -> bool:
    """Whether a model folder holds a guard instead of weights."""
    return (folder / FILE).is_file()


def _read(folder: Path) -> tuple[Shield, Origin, bytes, int]:
    try:
        held = json.loads((folder / FILE).read_text(encoding="utf-8"))
        key = (folder / KEY).read_bytes()
        made = Shield(method=held["name"], rows=tuple(Row(**r) for r in held["rows"]))
        origin = Origin(held["target"]["source"], held["target"]["digest"], held["data"])
        schema, seed = held["schema"], int(held["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The guard in {str(folder)!r} is damaged ({type(error).__name__}).", "Do the run again.") from None
    if schema != _SCHEMA:
        raise InputError(f"The guard in {str(folder)!r} was written by another version.", "Do the run again.")
    return made, origin, key, seed


def target_of(folder: Path) -> str:
    """The model that a guard's run stands before, as the run was told.

    Raises:
        InputError: the folder is damaged.
    """
    return _read(folder)[1].target


def open_guarded(folder: Path, target: LanguageAdapter, sets: Mapping[str, RecordSet]) -> SavedGuard:
    """A guarded model as it was made.

    Args:
        folder: the run's ``model/``.
        target: the model that it stands before.
        sets: the records of the run, ``forget`` and perhaps ``retain``.

    Raises:
        InputError: the folder is damaged, or model or records are not what they were.
    """
    made, origin, key, seed = _read(folder)
    if target.fingerprint() != origin.digest:
        said = f"The model {origin.target!r} is not the one that the guard in {str(folder)!r} stands before."
        raise InputError(said, "Put it back, or do the run again.")
    for name, digest in origin.data.items():
        if name not in sets or sets[name].digest != digest:
            raise InputError(f"The {name} records of {str(folder)!r} have changed since.", "Put them back, or do the run again.")
    return fit(target, made, sets["forget"], sets.get("retain"), key=key, seed=seed, origin=origin)


def refuse_guarded(adapter: LanguageAdapter) -> None:
    """Refuse to change what has no weights of its own.

    Raises:
        InputError: the model is guarded.
    """
    if isinstance(adapter, GuardedAdapter):
        _refuse()


def _refuse() -> NoReturn:
    raise InputError(
        "A guarded model has the weights of the model behind it: there is nothing to unlearn from.",
        "Start from that model, with the records of all requests.",
    )
