"""What metrics read: scores and generations of each model on each set, made when first asked for and shared by all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Example
from expunge.audit.document import Role
from expunge.audit.generations import generate
from expunge.audit.gradients import gradient_norms
from expunge.audit.outputs import References, RowOutputs, row_outputs
from expunge.audit.probes import Kind, Probes, items, probes, take_clusters
from expunge.audit.scores import Floats, Progress, TokenScores, score
from expunge.audit.store import ScoreStore
from expunge.core.access import Level, Offer
from expunge.core.errors import InputError, unknown
from expunge.core.results import Direction
from expunge.core.statistics import Interval, bootstrap
from expunge.data.records import Item, Record, RecordSet

T = TypeVar("T")
Goal = Literal["forget", "retain", "holdout", "utility"]


class Values(NamedTuple):
    """One number per record of a set.

    ``present`` tells which records have one: a value that is missing (no paraphrase, no target) is left out, whereas a value
    that is NaN or infinite because the model is broken stays in and makes the mean what it is.
    """

    values: Floats
    present: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Subject:
    """A model under audit: its name in the document, its role, and how to get at it.

    Attributes:
        label: unique name.
        role: target, unlearned, retrained or base.
        fingerprint: content hash, computed once.
        source: the adapter that holds the model, or a function that loads it. Of the models that are loaded by a function
            only the one in use is in memory.
    """

    label: str
    role: Role
    fingerprint: str
    source: Adapter | Callable[[], Adapter]


@dataclass(frozen=True)
class Protocol:
    """How evidence is gathered and how sure its numbers are said to be.

    Attributes:
        batch_tokens: padded tokens per batch.
        shard_examples: examples per cache file.
        max_new_tokens: longest continuation that any metric reads.
        draws, level, seed: of the bootstrap.
    """

    batch_tokens: int = 8192
    shard_examples: int = 512
    max_new_tokens: int = 200
    draws: int = 2000
    level: float = 0.95
    seed: int = 0


@dataclass
class Evidence:
    """Lazily gathered evidence about several models on the same sets.

    Attributes:
        subjects: the models by label.
        sets: records by name: ``forget``, ``retain``, ``holdout`` (never trained on) and any further named utility sets.
        protocol: how it is gathered.
        store: the cache on disk; None keeps everything in memory.
        progress: told what is being done.
        references: what many retrained models say about the rows; none for other modalities.
        offers: what the adapters of the models offer.
        ceiling: loss from which on nothing is known of an answer: that of a guess among the classes, for classifiers, or
            among the vocabulary, where guards stand before a language model.
        aside: sets that are only looked at to see whether something answers in a model's place; nothing is scored on them.
        asked: whether something stands before the weights of a model, which can only be asked.
        access: what is had of the models; with answers in words alone no score is read, and asking for one is an error.
        missing: what could not be measured and why, one sentence each, in order.
    """

    subjects: dict[str, Subject]
    sets: Mapping[str, RecordSet[Any]]
    protocol: Protocol = field(default_factory=Protocol)
    store: ScoreStore | None = None
    progress: Progress | None = None
    references: References | None = None
    offers: frozenset[Offer] = frozenset()
    ceiling: float = math.inf
    aside: Mapping[str, RecordSet[Any]] = field(default_factory=dict)
    asked: bool = False
    access: Level = Level.WEIGHTS
    missing: dict[str, None] = field(default_factory=dict)
    _open: tuple[str, Adapter] | None = field(default=None, repr=False)
    _held: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        held = next((s.source for s in self.subjects.values() if isinstance(s.source, Adapter)), None)
        if held is not None and not self.offers:
            self.of_modality(held)

    def of_modality(self, adapter: Adapter) -> None:
        """Take note of what the models offer: they are all of one modality."""
        self.offers = adapter.offers
        self.ceiling = math.log(adapter.n_classes) if adapter.n_classes else math.inf

    def records(self, name: str) -> RecordSet[Any]:
        """The records of a set.

        Raises:
            InputError: there is no such set.
        """
        if name not in self.sets and name not in self.aside:
            raise unknown("set", name, [*self.sets, *self.aside])
        return self.sets[name] if name in self.sets else self.aside[name]

    def goal(self, name: str) -> Goal:
        """What is wanted of a set: forget, retain, holdout, or utility for every other name."""
        return cast(Goal, name) if name in ("forget", "retain", "holdout") else "utility"

    def direction(self, name: str) -> Direction:
        """Direction of a quantity that grows with knowledge, measured on a set."""
        goal = self.goal(name)
        return {"forget": Direction.FORGET_DOWN, "holdout": Direction.REFERENCE}.get(goal, Direction.UTILITY_UP)

    def clusters(self, name: str) -> list[str]:
        """The independent unit of each record of a set."""
        return self.records(name).clusters()

    def subject(self, label: str) -> Subject:
        """A model by its label.

        Raises:
            InputError: there is none.
        """
        if label not in self.subjects:
            raise unknown("audited model", label, self.subjects)
        return self.subjects[label]

    def adapter(self, label: str) -> Adapter:
        """The adapter that holds a model; loads it, and lets go of the one loaded before."""
        source = self.subject(label).source
        if isinstance(source, Adapter):
            return source
        if self._open is None or self._open[0] != label:
            self._open = None  # before loading, so that two models are never held
            self._open = (label, source())
        return self._open[1]

    def release(self) -> None:
        """Let go of the model that was loaded last; it is loaded again if it is asked for."""
        self._open = None

    def decoder(self, label: str) -> Callable[[Sequence[int]], str]:
        """Writes a model's tokens as text; loads the model only when it is called."""
        return lambda tokens: self.adapter(label).decode(tokens)

    def labels(self, role: Role, but: str = "") -> list[str]:
        """Labels of the models of a role, without the model ``but`` and without models of its very weights.

        A model is never its own gold standard: a retrained model is compared with the *other* retrained ones.
        """
        own = self.subjects[but].fingerprint if but in self.subjects else ""
        return [s.label for s in self.subjects.values() if s.role == role and s.label != but and s.fingerprint != own]

    def miss(self, sentence: str) -> None:
        """Note, once, that something could not be measured."""
        self.missing[sentence] = None

    def memo(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """The value of ``key``, made at the first call."""
        if key not in self._held:
            self._held[key] = make()
        return cast(T, self._held[key])

    def scores(self, label: str, name: str, kind: Kind = "answer") -> TokenScores:
        """Per-target scores of a model on one kind of text of a set, one forward pass per example at most.

        Raises:
            InputError: the audit has answers in words alone.
        """
        if self.access is Level.TEXT:
            raise InputError(
                "A metric or an attack reads log-probabilities in an audit that has answers in words alone.",
                "Let it name what it reads among its needs, or audit with access=scores.",
            )
        subject = self.subject(label)
        at = self.protocol
        return self.memo(
            ("scores", subject.fingerprint, name, kind),
            lambda: score(
                self.adapter(label), self.probes(label, name, kind), store=self.store, fingerprint=subject.fingerprint,
                batch_tokens=at.batch_tokens, shard_examples=at.shard_examples, progress=self.progress,
                what=f"{label}: scoring {name} ({kind})",
            ),
        )  # fmt: skip

    def probes(self, label: str, name: str, kind: Kind) -> Probes:
        """The examples behind :meth:`scores`."""
        return probes(self.adapter(label), self.records(name), kind)

    def lengths(self, label: str, name: str) -> npt.NDArray[np.int64]:
        """Targets of the answer of each record of a set, as a model's tokens count them."""
        if self.access is not Level.TEXT:
            return self.scores(label, name).counts
        key = ("lengths", self.subject(label).fingerprint, name)
        return self.memo(key, lambda: np.array([e.n_targets for e in self.probes(label, name, "answer")], dtype=np.int64))

    def owners(self, name: str, kind: Kind) -> npt.NDArray[np.int64]:
        """Index of the record of each example of :meth:`scores`, ascending."""
        return np.array([p.record for p in items(self.records(name), kind)], dtype=np.int64)

    def has(self, name: str, kind: Kind) -> bool:
        """Whether any record of a set has texts of a kind."""
        return bool(items(self.records(name), kind))

    def generations(
        self, label: str, name: str, style: str = "answer", examples: Callable[[Adapter], Sequence[Example]] | None = None,
        limit: int | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Greedy continuations of the prompts of a set.

        Args:
            label: the model.
            name: the set.
            style: name of a way to prompt; ``answer`` asks as the record does.
            examples: makes the examples of any other style.
            limit: longest answer in tokens; none: the longest that anything reads.
        """
        subject = self.subject(label)
        at = self.protocol
        make = examples or (lambda adapter: probes(adapter, self.records(name), "answer"))

        def work() -> list[Generation]:
            adapter = self.adapter(label)
            return generate(
                adapter, make(adapter), limit or at.max_new_tokens, store=self.store, fingerprint=subject.fingerprint,
                batch_tokens=at.batch_tokens, progress=self.progress, what=f"{label}: generating {name} ({style})",
            )  # fmt: skip

        return self.memo(("generations", subject.fingerprint, name, style, limit), work)

    def outputs(self, label: str, name: str) -> RowOutputs:
        """Scores and last features of a model on the rows of a set, one forward pass."""
        subject = self.subject(label)
        at = self.protocol
        return self.memo(
            ("outputs", subject.fingerprint, name),
            lambda: row_outputs(
                self.adapter(label), self.records(name), store=self.store, fingerprint=subject.fingerprint,
                batch_tokens=at.batch_tokens,
            ),
        )  # fmt: skip

    def gradient_norms(self, label: str, name: str, budget: int) -> Values:
        """Gradient norms of the answers of at most ``budget`` records (whole clusters, drawn with the protocol's seed)."""
        subject = self.subject(label)
        records = self.records(name)
        chosen = take_clusters(self.clusters(name), budget, self.protocol.seed)

        def make() -> Values:
            adapter = self.adapter(label)
            examples = [adapter.encode(records[int(i)]) for i in chosen]
            norms = gradient_norms(
                adapter, examples, store=self.store, fingerprint=subject.fingerprint,
                progress=self.progress, what=f"{label}: gradient norms of {name}",
            )  # fmt: skip
            values = np.full(len(records), np.nan)
            values[chosen] = norms
            return Values(values, np.isin(np.arange(len(records)), chosen))

        return self.memo(("gradient", subject.fingerprint, name, budget), make)

    def interval(self, name: str, found: Values) -> Interval:
        """Mean over the present records of a set with its interval over clusters."""
        clusters = [c for c, p in zip(self.clusters(name), found.present, strict=True) if p]
        at = self.protocol
        return bootstrap(found.values[found.present], clusters, draws=at.draws, level=at.level, seed=at.seed)


def is_question(record: Item) -> bool:
    """Whether a record has a prompt to be answered (plain text and rows have none)."""
    return isinstance(record, Record) and not record.is_text


def need_sets(sets: Mapping[str, RecordSet[Any]]) -> None:
    """Check what every audit needs.

    Raises:
        InputError: there is no forget set, or a set is empty.
    """
    if "forget" not in sets:
        raise InputError("An audit needs a forget set.", "Give it under the name 'forget'.")
    for name, records in sets.items():
        if not len(records):
            raise InputError(f"The set {name!r} is empty: nothing can be measured on it.", "Give it records or leave it out.")
