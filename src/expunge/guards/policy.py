"""Rows of detectors and actions, fitted, and what they decide for one request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.guards.calibration import Threshold
from expunge.guards.conversation import Conversation
from expunge.guards.parts import (
    ACTIONS,
    DETECTORS,
    TEXT_LEVEL,
    Action,
    Detector,
    Doer,
    EmbeddingEdit,
    HiddenEdit,
    Hit,
    Hook,
    JointEdit,
    Material,
    Orders,
    Probe,
    Reading,
    ScoreEdit,
    Watcher,
    part,
)  # fmt: skip
from expunge.guards.target import Target, check_target, unique_ids

SORRY = "I'm sorry, but I can't help with that."

#: Where something can still be done about what is noticed at a hook: states are read when the prompt has been.
_REACH = {Hook.REQUEST: frozenset(Hook), Hook.HIDDEN: frozenset({Hook.SCORES, Hook.TEXT}), Hook.TEXT: frozenset({Hook.TEXT})}


class Row(Settings):
    """One guard: what notices, and what is done."""

    name: ClassVar[str] = "guard"

    label: str = Field("", description="how logs and reports call it; none: after its parts")
    detector: Detector = Field(description="what notices")
    action: Action = Field(description="what is done")
    on_error: Literal["refuse", "pass"] = Field(
        "refuse", description="what happens if a part of it fails while it runs: refuse the request, or go on without it"
    )

    @field_validator("detector", mode="before")
    @classmethod
    def _detector(cls, value: object) -> object:
        return part(DETECTORS, value)

    @field_validator("action", mode="before")
    @classmethod
    def _action(cls, value: object) -> object:
        return part(ACTIONS, value)

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if not any(self.action.acts & _REACH[h] for h in self.detector.sees):
            raise ValueError(
                f"the detector {self.detector.name!r} notices on {', '.join(sorted(self.detector.sees))}, too late for the "
                f"action {self.action.name!r}, which acts on {', '.join(sorted(self.action.acts))}"
            )
        return self

    @property
    def title(self) -> str:
        """``label``, or the names of its parts."""
        return self.label or f"{self.detector.name}+{self.action.name}"

    @property
    def hooks(self) -> frozenset[Hook]:
        """Where it looks or acts."""
        return self.detector.sees | self.action.acts

    @property
    def probed(self) -> frozenset[Probe]:
        """What texts are read of when it is fitted."""
        return self.detector.probed | self.action.probed

    def described(self) -> dict[str, Any]:
        """What it is, with all settings, for digests and logs."""
        parts = {
            k: {"name": p.name, **p.model_dump(mode="json")} for k, p in (("detector", self.detector), ("action", self.action))
        }
        return {"label": self.title, **parts, "on_error": self.on_error}


@dataclass(frozen=True)
class Fired:
    """That a row has acted on a request.

    Attributes:
        row: its title.
        target: id; empty where the detector does not know.
        score: of the detector.
        hook: where it was noticed.
        action: name.
    """

    row: str
    target: str
    score: float
    hook: Hook
    action: str


@dataclass(frozen=True)
class _Fitted:
    row: Row
    watcher: Watcher
    doer: Doer


def _bounds(rows: Sequence[_Fitted]) -> dict[str, Threshold]:
    found = {f.row.title: getattr(f.watcher, "bound", None) for f in rows}
    return {title: bound for title, bound in found.items() if isinstance(bound, Threshold)}


class Policy:
    """Fitted rows, in order. One object serves all requests; targets come and go while it does.

    Args:
        rows: what notices and what is done, the first refusal wins.
        material: what they are fitted on.

    Raises:
        InputError: no row, a target that hides nothing or nearly everything, or material that a part needs and that is not there.
    """

    def __init__(self, rows: Sequence[Row], material: Material) -> None:
        if not rows:
            raise InputError("There is no guard.", "Give at least one.")
        titles = [r.title for r in rows]
        if double := next((t for t in titles if titles.count(t) > 1), None):
            raise InputError(f"Two guards are called {double!r}.", "Give each a label of its own.")
        unique_ids(material.targets)
        for target in material.targets:
            check_target(target, material.ordinary)
        if material.adapter is None:
            for row in rows:
                if extra := sorted(row.hooks - TEXT_LEVEL):
                    raise InputError(
                        f"The guard {row.title!r} works on {', '.join(extra)} of the model, and there is none here.",
                        "Serve the model with --model, or use guards of request and text.",
                    )
        self.material = material
        self._targets = {t.id: t for t in material.targets}
        self._version = 0
        self._rows = [_Fitted(r, r.detector.fit(material), r.action.prepare(material)) for r in rows]
        self._lock = threading.Lock()
        for target in material.targets:
            self._check_covered(target)

    @property
    def promises(self) -> dict[str, str]:
        """What guards promise about ordinary prompts now, by title; guards that promise nothing are left out."""
        return {f.row.title: f.watcher.promise for f in self._rows if f.watcher.promise}

    @property
    def bounds(self) -> dict[str, Threshold]:
        """Thresholds of guards that score, as they are now, by title."""
        return _bounds(self._rows)

    @property
    def rows(self) -> list[Row]:
        """The rows, unfitted."""
        return [f.row for f in self._rows]

    @property
    def targets(self) -> Mapping[str, Target]:
        """What is hidden now, by id."""
        return dict(self._targets)

    @property
    def hooks(self) -> frozenset[Hook]:
        """Where any row looks or acts."""
        return frozenset().union(*(r.hooks for r in self.rows))

    @property
    def readings(self) -> frozenset[Reading]:
        """States that watchers want to see."""
        return frozenset(r for f in self._rows for r in f.watcher.readings)

    def digest(self) -> str:
        """SHA-256 of rows and ids of targets: which policy decided."""
        said = {"rows": [r.described() for r in self.rows], "targets": sorted(self._targets)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def add(self, target: Target) -> None:
        """Hide one target more; done when this returns.

        Raises:
            InputError: it hides nothing or nearly everything, or a detector cannot take it in while it runs.
        """
        unique_ids([target])
        self.check(target)
        with self._lock:
            done: list[_Fitted] = []
            try:
                for fitted in self._rows:
                    done.append(fitted)
                    fitted.watcher.add(target)
                    fitted.doer.add(target)
            except BaseException:
                for fitted in done:  # all rows hide it, or none does
                    with suppress(InputError):
                        fitted.watcher.drop(target.id)
                        fitted.doer.drop(target.id)
                raise
            self._targets = {**self._targets, target.id: target}
            self._version += 1

    def check(self, target: Target) -> None:
        """Refuse a target that cannot be hidden here, before anything is done about it.

        Raises:
            InputError: it hides nothing or nearly everything, or no guard here can notice it.
        """
        check_target(target, self.material.ordinary)
        self._check_covered(target)

    def _check_covered(self, target: Target) -> None:
        if not any(f.watcher.covers(target) and f.doer.covers(target) for f in self._rows):
            raise InputError(
                f"No guard here can notice the target: it has {target.summary()}, and the guards are "
                f"{', '.join(r.title for r in self.rows)}.",
                "Give names for guards of names, examples or topics for guards of meanings, probe texts for guards of skills.",
            )

    def drop(self, target: str) -> None:
        """Hide a target no more; done when this returns. One that is not hidden is passed over."""
        with self._lock:
            if target in self._targets:
                for fitted in self._rows:
                    fitted.watcher.drop(target)
                    fitted.doer.drop(target)
                self._targets = {k: v for k, v in self._targets.items() if k != target}
                self._version += 1

    @property
    def version(self) -> int:
        """Another number whenever a target comes or goes."""
        return self._version

    def open(self, conversation: Conversation, noticed: Noticed | None = None) -> Plan:
        """Look at a request; what is to be done about it.

        Args:
            conversation: what is asked.
            noticed: what detectors have noticed of the same conversation, asked of this :attr:`version`; it is filled with what
                they notice now. They are not asked again, actions are.
        """
        return Plan(self._rows, conversation, {} if noticed is None else noticed)


#: What detectors say of a request before its answer, by title of their row and hook; it follows from the request alone.
Noticed = dict[tuple[str, Hook], Sequence[Hit]]


@dataclass(frozen=True)
class Ordered:
    """An edit of scores, under the care of the row that has ordered it.

    Attributes:
        edit: what is done.
        guarded: does some work, or, if that fails, what the row has for this case; gives what stands in for its result then.
    """

    edit: ScoreEdit
    guarded: Callable[[Callable[[], Any], Any], Any]

    def __call__(self, ids: Tensor, prompt: int, scores: Tensor) -> Tensor:
        """Scores ``[V]`` of the next token."""
        changed: Tensor = self.guarded(partial(self.edit, ids, prompt, scores), scores)
        return changed


def scored(rows: Sequence[tuple[Plan, Tensor, int, Tensor]]) -> list[Tensor]:
    """Scores ``[V]`` of next tokens with what was ordered: of requests of a batch, of beams, or of an answer at all its places.

    Args:
        rows: plan, ids so far ``[T]``, length of the prompt and scores of each; see :data:`~expunge.guards.parts.ScoreEdit`.
    """
    made = [scores for *_, scores in rows]
    for turn in range(max((len(plan.scores) for plan, *_ in rows), default=0)):
        groups: dict[Hashable, list[int]] = {}
        for at, (plan, *_) in enumerate(rows):
            if turn < len(plan.scores):
                edit = plan.scores[turn].edit
                groups.setdefault((edit.shared,) if isinstance(edit, JointEdit) else at, []).append(at)
        for members in groups.values():
            given = [(rows[at][0].scores[turn], *rows[at][1:3], made[at]) for at in members]
            for at, scores in zip(members, _jointly(given), strict=True):
                made[at] = scores
    return made


def _jointly(rows: Sequence[tuple[Ordered, Tensor, int, Tensor]]) -> list[Tensor]:
    first = rows[0][0].edit
    if len(rows) > 1 and isinstance(first, JointEdit):
        with suppress(Exception):  # whose fault it is shows below: no request fails for another
            return first.together([(ordered.edit, ids, prompt, scores) for ordered, ids, prompt, scores in rows])
    return [ordered(ids, prompt, scores) for ordered, ids, prompt, scores in rows]


@dataclass
class Plan:
    """What is decided for one request. It belongs to that request alone and ends with it.

    Attributes:
        asked: the conversation as it came.
        conversation: as the model is asked.
        say: the answer in place of the model's; none: the model answers.
        embeddings, hidden, scores, revisions: what is done to the request's own prompt, states, scores and answer.
        fired: which rows have acted, in order.
        failed: titles of rows that failed, with the kind of the error (never its words, which may quote the request).
        seconds: time spent by hook.
    """

    _rows: Sequence[_Fitted]
    asked: Conversation
    _noticed: Noticed = field(default_factory=dict)
    conversation: Conversation = field(init=False)
    say: str | None = None
    embeddings: list[EmbeddingEdit] = field(default_factory=list)
    hidden: list[HiddenEdit] = field(default_factory=list)
    scores: list[Ordered] = field(default_factory=list)
    revisions: list[tuple[_Fitted, Callable[[str], str]]] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[Hook, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.conversation = self.asked
        self._passed = 0
        self._acted: set[tuple[str, Hook]] = set()
        self._each(Hook.REQUEST, lambda f: f.watcher.request(self.asked))

    def read(self, states: Mapping[Reading, Tensor]) -> None:
        """Look at the states of the prompt, ``[D]`` each; at those of :attr:`readings`."""

        def seen(fitted: _Fitted) -> list[Hit]:
            return fitted.watcher.hidden({r: states[r] for r in fitted.watcher.readings})

        self._each(Hook.HIDDEN, seen)

    def give_up(self, where: str, why: str) -> None:
        """Refuse, since what guards do leaves nothing that could be said.

        Args:
            where: what they have done it to.
            why: the kind of the failure.
        """
        self.failed.append((where, why))
        self.say = SORRY if self.say is None else self.say

    @property
    def begun(self) -> bool:
        """Whether something of an answer has been let pass: then it cannot be begun again."""
        return self._passed > 0

    def release(self, text: str, final: bool) -> int:
        """Look at an answer as far as it is known; how many characters of it may be sent.

        Where a row refuses, :attr:`say` is set: what was sent stays sent, and nothing more of the answer follows.
        """
        if self.say is not None:
            return self._passed
        start = self._passed
        self._each(Hook.TEXT, lambda f: f.watcher.answer(self.asked, text, start, final))
        if self.say is not None or (self.buffered and not final):
            return self._passed
        if final:
            self._passed = len(text)
        else:
            looking = [f for f in self._rows if Hook.TEXT in f.row.detector.sees]
            limits = [self._guarded(f, partial(f.watcher.safe, text, start), start) for f in looking]
            self._passed = max(start, min(limits, default=len(text)))
        return self._passed if self.say is None else start

    def revised(self, text: str) -> str:
        """The whole answer as it is sent: revised where that was ordered, and what is said instead where a row has refused.

        What a revision has made is looked at like an answer of the model.
        """
        before = text
        for fitted, revise in self.revisions:
            if self.say is not None:
                break
            began = time.perf_counter()
            text = self._guarded(fitted, partial(revise, text), text)
            self._took(Hook.TEXT, began)
        if text != before and self.say is None:
            self._acted = {a for a in self._acted if a[1] != Hook.TEXT}
            self._each(Hook.TEXT, lambda f: f.watcher.answer(self.asked, text, 0, True))
        return text if self.say is None else self.say

    @property
    def readings(self) -> frozenset[Reading]:
        """States that watchers want to see and have not seen."""
        unseen = (f for f in self._rows if (f.row.title, Hook.HIDDEN) not in self._noticed)
        return frozenset(r for f in unseen for r in f.watcher.readings)

    @property
    def bounds(self) -> dict[str, Threshold]:
        """Thresholds of guards that score, as they are now, by title."""
        return _bounds(self._rows)

    @property
    def buffered(self) -> bool:
        """Whether nothing may be sent before the answer is whole."""
        return any(f.row.action.revises for f in self._rows)

    def _each(self, hook: Hook, look: Callable[[_Fitted], list[Hit]]) -> None:
        began = time.perf_counter()
        for fitted in self._rows:
            if self.say is not None:
                break
            if hook in fitted.row.detector.sees:
                self._guarded(fitted, partial(self._look, fitted, hook, look), None)
        self._took(hook, began)

    def _look(self, fitted: _Fitted, hook: Hook, look: Callable[[_Fitted], list[Hit]]) -> None:
        at = (fitted.row.title, hook)
        hits = self._noticed[at] if at in self._noticed else look(fitted)
        if hook is not Hook.TEXT:
            self._noticed[at] = hits
        self._act(fitted, hook, hits)

    def _act(self, fitted: _Fitted, hook: Hook, hits: Sequence[Hit]) -> None:
        if not hits or (fitted.row.title, hook) in self._acted:  # an answer is looked at again and again
            return
        self._acted.add((fitted.row.title, hook))
        self.obey(fitted, fitted.doer.orders(self.conversation, hits))
        self.fired += [Fired(fitted.row.title, h.target, h.score, hook, fitted.row.action.name) for h in hits]

    def obey(self, fitted: _Fitted, orders: Orders) -> None:
        """Put orders of a row into the plan."""
        self.say = orders.say if self.say is None else self.say
        self.conversation = orders.conversation or self.conversation
        self.embeddings += [orders.embeddings] if orders.embeddings else []
        self.hidden += orders.hidden
        self.scores += [Ordered(orders.scores, partial(self._guarded, fitted))] if orders.scores else []
        self.revisions += [(fitted, orders.revise)] if orders.revise else []

    def _guarded(self, fitted: _Fitted, work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a part raises, a request that is not checked must not pass
            self.failed.append((fitted.row.title, type(error).__name__))
            if fitted.row.on_error == "refuse" and self.say is None:
                self.say = SORRY
            return otherwise

    def _took(self, hook: Hook, began: float) -> None:
        self.seconds[hook] = self.seconds.get(hook, 0.0) + time.perf_counter() - began
