"""What attacks on hidden states share: facts that are told apart at every layer, and values kept in the cache of an audit."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.audit.attacks.registry import Access, Attack, Criterion
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.registry import Range
from expunge.audit.probes import take_clusters
from expunge.audit.statements import Fact, Statement, contrasts, facts, false_answers
from expunge.audit.store import compute_signature
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.core.statistics import bootstrap
from expunge.data.records import Record

Arrays = Mapping[str, NDArray[Any]]


def kept(attack: Attack, evidence: Evidence, label: str, name: str, *, part: str, make: Callable[[], Arrays]) -> Arrays:
    """Arrays that an attack makes of a model, once per content of model, sets and settings: what is more than one value a record.

    Args:
        attack: whose settings count, and on what else its values depend.
        evidence: of the audit.
        label, name: the model and the set.
        part: which of the attack's arrays.
        make: makes them.
    """
    subject, depends = evidence.subject(label), dict(attack.depends(evidence, label))
    key = ("attack part", attack.name, part, attack.model_dump_json(), subject.fingerprint, name, repr(sorted(depends.items())))

    def stored() -> Arrays:
        store, at = evidence.store, evidence.protocol
        if store is None:
            return make()
        path = store.key(
            "attack part", subject.fingerprint, compute_signature(evidence.adapter(label), at.batch_tokens),
            "+".join(f"{n}={r.digest}" for n, r in sorted(evidence.sets.items())), attack=attack.name, part=part,
            version=attack.version, settings=attack.model_dump(mode="json"), measured=name, seed=at.seed, depends=depends,
        )  # fmt: skip
        held = store.load_arrays(path)
        if held is None:
            held = dict(make())
            store.save_arrays(path, held)
        return held

    return evidence.memo(key, stored)


def target_of(evidence: Evidence) -> str:
    """Label of the target model, or nothing."""
    return next(iter(evidence.labels("target")), "")


def record_number(
    evidence: Evidence, name: str, values: Floats, direction: Direction, *, range: Range, note: str
) -> Number | None:
    """The mean of one value per record (NaN where there is none) with its interval over clusters; None if there is none."""
    here = np.isfinite(values)
    if not here.any():
        return None
    at = evidence.protocol
    clusters = [c for c, p in zip(evidence.clusters(name), here, strict=True) if p]
    return bootstrap(values[here], clusters, draws=at.draws, level=at.level, seed=at.seed).number(direction, range, note)


class LayerAttack(Attack):
    """One value per forget record and layer: how much more a layer says for the true answer than for false ones.

    A subclass writes :meth:`arrays` and may write :meth:`reduce` (over layers). With ``contrast`` false
    answers are subtracted, so that nothing counts but what tells true from false; whoever only knows the form of the answers, in
    whatever basis, is at 0. Without it the whole answer is read, and retrained models that began at other random weights are no
    control for models that began at the target's.
    """

    access: ClassVar[Access] = Access.WEIGHTS
    criterion: ClassVar[Criterion] = Criterion.REPRESENTATION
    range: ClassVar[Range] = (None, None)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.FEATURES, Offer.LOGITS, Offer.SEQUENCE})

    contrast: bool = Field(True, description="subtract what false answers of the record get; without: the answer alone")
    wrong: int = Field(2, ge=1, le=16, description="false answers per record that are compared")
    examples: int = Field(100, ge=2, description="records at most, whole clusters: states of all layers are held")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """False answers, where they are subtracted."""
        if not self.contrast or any(isinstance(r, Record) and false_answers(r, 1) for r in evidence.records(name)):
            return ""
        return "it needs records with wrong answers (perturbed), or contrast=false"

    def reduce(self, layers: Floats) -> Floats:
        """One value from those of all layers, ``[L, facts]`` to ``[facts]``: those of the layer with the largest mean.

        One layer for all facts: the largest of each fact would find something in noise.
        """
        return np.asarray(layers[int(np.argmax(layers.mean(axis=1)))], dtype=np.float64)

    def facts(self, evidence: Evidence, adapter: Adapter, name: str) -> list[Fact]:
        """The records that are measured."""
        chosen = take_clusters(evidence.clusters(name), self.examples, evidence.protocol.seed)
        return facts(adapter, evidence.records(name), chosen.tolist(), self.wrong if self.contrast else 0)

    @abc.abstractmethod
    def arrays(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """``layers`` ``[L, records]``, NaN for records that are not measured, and ``measured`` ``[records]``; L = 0 where the
        model cannot be read."""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """:meth:`reduce` of what the layers say."""
        held = self.arrays(evidence, label, name)
        layers, measured = held["layers"].astype(np.float64), held["measured"].astype(np.bool_)
        values = np.full(layers.shape[1], np.nan)
        if len(layers):
            values[measured] = self.reduce(layers[:, measured])
        return Values(values, measured)


class StatementAttack(LayerAttack):
    """A :class:`LayerAttack` that gives each statement, true or false, a value of its own; it writes :meth:`measure`."""

    @abc.abstractmethod
    def measure(self, evidence: Evidence, label: str, statements: Sequence[Statement]) -> Floats:
        """A value of each statement at each layer, ``[L, statements]``.

        Raises:
            InputError: the model cannot be read in this way; its values are then missing, and the audit says so.
        """

    def arrays(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """``layers`` ``[L, records]``, NaN for records that are not measured, and ``measured`` ``[records]``; L = 0 where the
        model cannot be read."""

        def make() -> Arrays:
            found = self.facts(evidence, evidence.adapter(label), name)
            size = len(evidence.records(name))
            measured = np.zeros(size, dtype=np.bool_)
            try:
                said = self.measure(evidence, label, [s for f in found for s in f.statements])
            except InputError as error:
                evidence.miss(f"{self.title} of {label!r} was not measured: {error.message}")
                return {"layers": np.zeros((0, size)), "measured": measured}
            at = [f.record for f in found]
            out = np.full((len(said), size), np.nan)
            out[:, at] = contrasts(said, found)
            measured[at] = True
            return {"layers": out, "measured": measured}

        return kept(self, evidence, label, name, part="layers", make=make)
