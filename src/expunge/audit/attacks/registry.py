"""What an attack is, and the registry of attacks: ways to bring back what a model no longer says by itself.

Membership scores (:mod:`~expunge.audit.attacks.membership`) read what an audit scores anyway. The attacks here do more: they ask
in other ways, read hidden states, or act on a copy. Each gives one value per forget record, so that the model under audit, the
retrained models and the target can be compared record by record. What only the retrained models' own values show to be a guess, a
leak of the prompt or a property of the data, is so shown: an attack without that control says nothing.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.registry import Need, RecordMetric
from expunge.audit.store import compute_signature
from expunge.core.access import Offer
from expunge.core.registry import Registry, origin_of
from expunge.core.results import Direction


class Access(enum.StrEnum):
    """What an attacker must be able to see or do."""

    TEXT = "answers in words"
    SCORES = "log-probabilities of tokens"
    WEIGHTS = "the weights"
    BOTH = "the target model beside the unlearned one"


class Criterion(enum.StrEnum):
    """What removal would have to withstand (after the SoK of Ren et al. 2025, arXiv 2506.09227)."""

    BEHAVIOUR = "behaviour on the form that was unlearned"
    FORM = "other forms of the same knowledge"
    PROMPTS = "adversarial prompts"
    DECODING = "many samples instead of one greedy answer"
    LIKELIHOOD = "membership by likelihood"
    RELEARNING = "relearning"
    COMPRESSION = "compression of the weights"
    REPRESENTATION = "hidden states and weights"
    TWO_MODELS = "comparison with the target"
    CONTEXT = "reintroduction in context"


class Attack(RecordMetric, abc.ABC):
    """One value per forget record, from asking otherwise, looking inside, or acting on a copy.

    A subclass writes ``per_record`` (one value per record of the set; absent where a record does not allow the attack) and
    ``lacks``. ``values`` keeps what was found in the cache of the audit, by the content of the model, the data and the settings:
    the work on target and retrained models is done once for all methods. An attack must not change the model it is given
    (``evidence.adapter(label).copy()`` is what may be changed), and must not depend on anything but weights, data, settings and
    ``evidence.protocol.seed``.

    An attack that finds more than one number per record (the answers to several prompts, a control) writes ``columns`` instead:
    the column ``""`` holds the values that are compared, and ``column`` gives the others, which are kept with them.
    """

    access: ClassVar[Access]
    criterion: ClassVar[Criterion]
    passes: ClassVar[str]  #: cost per forget record in forward passes or generations, in words
    copies: ClassVar[bool] = False  #: whether it acts on a copy of the model
    convicts: ClassVar[bool] = True  #: whether a verdict compares it; what retrained models are no control for is shown only
    usual: ClassVar[bool] = False  #: whether it is tried unasked; it then does not stand for others that test the same
    toward: ClassVar[Literal[1, -1]] = 1  #: +1 if values grow with knowledge, -1 if they fall
    sets: ClassVar[tuple[str, ...] | None] = ("forget",)
    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ()
    direction: ClassVar[Direction] = Direction.REFERENCE
    version: ClassVar[int] = 1  #: raised when the values change for the same model, data and settings

    def direction_on(self, evidence: Evidence, name: str) -> Direction:
        """Best where it equals the retrained models' value."""
        return self.direction

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """What else than the model, the sets and the settings the values depend on (the target's fingerprint, for instance)."""
        return {}

    def applies(self, evidence: Evidence, label: str) -> bool:
        """Whether a model allows the attack; one that does not has values only where others are compared with it."""
        return True

    def certain(self, evidence: Evidence, label: str) -> str:
        """What was found of a model beyond doubt, one sentence that a verdict quotes; empty where values must be compared."""
        return ""

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """One value per record of the set ``name``."""
        return self.columns(evidence, label, name)[""]

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """All values per record that the attack finds, by name; ``""`` are those that are compared."""
        return {"": self.per_record(evidence, label, name)}

    def values(self, evidence: Evidence, label: str, name: str) -> Values:
        """:meth:`per_record` of the model, computed once per content of model, sets and settings."""
        return self.column(evidence, label, name, "")

    def column(self, evidence: Evidence, label: str, name: str, which: str) -> Values:
        """One of the :meth:`columns`, computed as :meth:`values` are."""
        subject = evidence.subject(label)
        depends = dict(self.depends(evidence, label))
        key = ("attack", self.name, self.model_dump_json(), subject.fingerprint, name, repr(sorted(depends.items())))
        return evidence.memo(key, lambda: self._stored(evidence, label, name, depends))[which]

    def _stored(self, evidence: Evidence, label: str, name: str, depends: Mapping[str, Any]) -> dict[str, Values]:
        store, at = evidence.store, evidence.protocol
        if store is None or not evidence.adapter(label).lasting:
            return self._told(evidence, label, name)
        key = store.key(
            "attack", evidence.subject(label).fingerprint, compute_signature(evidence.adapter(label), at.batch_tokens),
            "+".join(f"{n}={r.digest}" for n, r in sorted(evidence.sets.items())), attack=self.name, version=self.version,
            settings=self.model_dump(mode="json"), measured=name, seed=at.seed, depends=dict(depends),
        )  # fmt: skip
        held = store.load_arrays(key)
        if held is not None:
            names = [k.removeprefix("values") for k in held if k.startswith("values")]
            return {n.removeprefix("."): _values(held["values" + n], held["present" + n]) for n in names}
        found = self._told(evidence, label, name)
        columns = {f".{n}" if n else "": v for n, v in found.items()}
        store.save_arrays(
            key, {f"{k}{n}": a for n, v in columns.items() for k, a in (("values", v.values), ("present", v.present))}
        )
        return found

    def _told(self, evidence: Evidence, label: str, name: str) -> dict[str, Values]:
        if evidence.progress is not None:
            evidence.progress(f"{label}: {self.title}", 0, 1)
        found = dict(self.columns(evidence, label, name))
        if evidence.progress is not None:
            evidence.progress(f"{label}: {self.title}", 1, 1)
        return found


def _values(values: npt.NDArray[Any], present: npt.NDArray[Any]) -> Values:
    return Values(values.astype(np.float64), present.astype(np.bool_))


ATTACKS: Registry[type[Attack]] = Registry("attack", "expunge.audit.attacks", "expunge.attacks")


def attack(cls: type[Attack]) -> type[Attack]:
    """Class decorator: register an attack under its ``name``."""
    return ATTACKS.add(cls.name, cls, origin_of(cls.__module__))


def fitting(offers: frozenset[Offer]) -> tuple[str, ...]:
    """Names of the attacks that a modality allows, by name."""
    return tuple(n for n in ATTACKS.names() if ATTACKS.get(n).offers <= offers)
