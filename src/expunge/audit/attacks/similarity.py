"""How alike hidden states are: to the target's, and to those of retrained models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from expunge.audit.attacks.inside import Arrays, kept, target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.kernel.representation import linear_cka
from expunge.audit.metrics.papers import REALLY
from expunge.audit.metrics.registry import Range
from expunge.audit.probes import take_clusters
from expunge.audit.statements import facts, statement_means, states_of
from expunge.core.access import Offer
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.engine.parts import Paper


@attack
class RepresentationSimilarity(Attack):
    """Similarity of hidden states on forget answers to the target's and to retrained models', whatever the basis (linear CKA).

    The state of a record is the mean over the tokens that predict its answer. The value of a record is how much its
    similarities to the other records agree with those that the target sees (cosine of the rows of both centred kernels), as a
    mean over layers; the CKA of each pair of models, unbiased and as a mean over layers, is given beside it. Two retrained
    models are the ceiling of what can be expected: they are not at 1. States near the target's are no proof of knowledge, for
    training from the target leaves most of what it had to do with other things; so the number is shown and not judged.
    """

    name: ClassVar[str] = "representation-similarity"
    title: ClassVar[str] = "Similarity of hidden states to the target's"
    formula: ClassVar[str] = "mean_l cos(row i of H K_l H, row i of H T_l H), K, T kernels of the model's and the target's states"
    paper: ClassVar[Paper] = REALLY
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.REPRESENTATION
    convicts: ClassVar[bool] = False
    passes: ClassVar[str] = "1 forward pass"
    range: ClassVar[Range] = (-1.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.FEATURES, Offer.SEQUENCE})

    examples: int = Field(200, ge=4, description="records at most, whole clusters")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target and four records."""
        if not target_of(evidence):
            return "it needs the target model"
        return "" if len(evidence.records(name)) >= 4 else "it needs four forget records"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def chosen(self, evidence: Evidence, name: str) -> NDArray[np.int64]:
        """Indices of the records that are read."""
        return take_clusters(evidence.clusters(name), self.examples, evidence.protocol.seed)

    def features(self, evidence: Evidence, label: str, name: str) -> Floats:
        """The states of the chosen records after each layer, ``[L, n, D]``."""

        def make() -> Arrays:
            adapter = evidence.adapter(label)
            found = [f.right for f in facts(adapter, evidence.records(name), self.chosen(evidence, name).tolist(), 0)]
            states = states_of(adapter, found, adapter.layers(), evidence.protocol.batch_tokens).values
            means = statement_means(states.double().numpy().transpose(0, 2, 1), found)
            return {"features": means.transpose(0, 2, 1).astype(np.float32)}

        return kept(self, evidence, label, name, part="features", make=make)["features"].astype(np.float64)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Agreement of each record's similarities with the target's."""
        own = self.features(evidence, label, name)
        full = self.features(evidence, target_of(evidence), name)
        values, present = np.full(len(evidence.records(name)), np.nan), np.zeros(len(evidence.records(name)), dtype=np.bool_)
        at = self.chosen(evidence, name)
        values[at] = np.mean([row_agreement(a, b) for a, b in zip(own, full, strict=True)], axis=0)
        present[at] = True
        return Values(values, present)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The mean agreement, and CKA to the target, to retrained models, and of these among themselves."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        others = evidence.labels("retrained", but=label)
        own = self.features(evidence, label, "forget")
        held = {o: self.features(evidence, o, "forget") for o in (target_of(evidence), *others)}
        pairs = [(a, b) for i, a in enumerate(others) for b in others[i + 1 :]]
        found = {
            "cka-target": ([cka(own, held[target_of(evidence)])], "CKA with the target, a mean over layers"),
            "cka-retrained": ([cka(own, held[o]) for o in others], "CKA with retrained models, a mean over them and over layers"),
            "cka-ceiling": ([cka(held[a], held[b]) for a, b in pairs], "CKA of retrained models with each other"),
        }
        for key, (values, note) in found.items():
            if values:
                number = self.plain(evidence, "forget", float(np.mean(values)), note)
                out[f"forget.{self.name}.{key}"] = number.model_copy(update={"direction": Direction.REFERENCE})
        return out


def row_agreement(x: Floats, y: Floats) -> Floats:
    """Cosine of the rows of two centred linear kernels, ``[n]``; 1 for states that are equal up to rotation, scale and shift.

    Args:
        x, y: states of the same n records, ``[n, D]`` and ``[n, E]``.
    """
    kernels = []
    for states in (x, y):
        centred = states - states.mean(axis=0)
        kernels.append(centred @ centred.T)
    a, b = kernels
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.divide((a * b).sum(axis=1), size, out=np.full(len(a), np.nan), where=size > 0), dtype=np.float64)


def cka(x: Floats, y: Floats) -> float:
    """Unbiased linear CKA of ``[L, n, D]`` and ``[L, n, E]``, a mean over layers."""
    return float(np.mean([linear_cka(a, b, unbiased=True) for a, b in zip(x, y, strict=True)]))
