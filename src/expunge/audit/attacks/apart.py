"""Taken apart: does the model hold, beside what was added to it, one that still knows?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from expunge.adapters.apart import WITHOUT_ADAPTER
from expunge.adapters.base import Adapter
from expunge.audit.attacks.inside import target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Subject, Values
from expunge.audit.metrics.papers import SOK
from expunge.audit.metrics.registry import Range
from expunge.audit.scores import Floats, score
from expunge.audit.telling import told
from expunge.core.access import Level, Offer
from expunge.core.results import Number
from expunge.engine.parts import Paper


@attack
class TakenApart(Attack):
    """The loss of the forget answers under what is left of the model when what was added to it is taken away.

    Some results are a target that stays as it was, and something that has a say in its scores: an assistant, updates that a
    detector loads, projections of its states. Whoever has the files can leave the addition out, and asks the rest. Each part that
    answers by itself is scored, and the one to which the forget answers are likeliest counts; target and retrained models are
    taken as they are. If a part is the target itself (the same hash of weights, configuration and tokenizer), nothing needs to be
    compared: the target lies inside unchanged, and the verdict says so. A model without additions has no such check.

    In an audit with answers in words alone the parts are asked and not scored: what counts is the share of each answer that is
    not told. That is what the auditor knows who has the files of the model, as every check here is.

    It tells nothing of somebody who can only ask the model and sees neither its files nor its parts. A low-rank adapter that was
    not merged is an addition too, but one that merging joins to the weights without changing what the model says: it is named
    among what the audit does not show, and counts only with ``adapters=true``.
    """

    name: ClassVar[str] = "taken-apart"
    title: ClassVar[str] = "Taking the model apart"
    formula: ClassVar[str] = "min over parts of mean NLL(answer) under the part; of words: 1 - ROUGE-L recall of its answer"
    paper: ClassVar[Paper] = SOK
    criterion: ClassVar[Criterion] = Criterion.REPRESENTATION
    access: ClassVar[Access] = Access.WEIGHTS
    passes: ClassVar[str] = "1 forward pass for each part; none for a model without additions"
    usual: ClassVar[bool] = True
    toward: ClassVar[Literal[1, -1]] = -1
    range: ClassVar[Range] = (0.0, None)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT})

    adapters: bool = Field(False, description="count an adapter that was not merged as an addition that is taken away")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing."""
        return ""

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target, which is looked for among the parts, and whether the model is one that was unlearned."""
        target = target_of(evidence)
        return {
            "target": evidence.subject(target).fingerprint if target else "",
            "unlearned": evidence.subject(label).role == "unlearned",
            **({"access": str(evidence.access)} if evidence.access is Level.TEXT else {}),
        }

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """Losses under the part that knows most, or under the whole model where there are no parts.

        The columns beside them hold ones and zeros, the same for every record: whether there are parts, whether one is the
        target, and whether the target is what an adapter stands on that was not merged.
        """
        held, records = self.depends(evidence, label), evidence.records(name)
        losses: list[Floats] = []
        unchanged, beneath = False, False
        for part, other in every_part(evidence.adapter(label)) if held["unlearned"] else ():
            same = other.fingerprint() == held["target"]
            if part == WITHOUT_ADAPTER and not self.adapters:
                beneath = beneath or same
                continue
            unchanged = unchanged or same
            losses.append(_of_part(evidence, other, name))
        finite = [v for v in losses if np.isfinite(v[_present(evidence, v)]).all()]
        mean = {id(v): float(np.mean(v[_present(evidence, v)])) for v in losses}
        values = min(finite or losses, key=lambda v: mean[id(v)]) if losses else _of_model(evidence, label, name)
        found = {"": values, "parts": bool(losses), "unchanged": unchanged, "beneath": beneath}
        whole = {k: np.broadcast_to(np.asarray(v, dtype=np.float64), len(records)) for k, v in found.items()}
        return {k: Values(v, _present(evidence, v)) for k, v in whole.items()}

    def applies(self, evidence: Evidence, label: str) -> bool:
        """Whether the model has parts."""
        return self._is(evidence, label, "parts")

    def certain(self, evidence: Evidence, label: str) -> str:
        """That a part is the target."""
        if not self._is(evidence, label, "unchanged"):
            return ""
        values = self.values(evidence, label, "forget")
        mean = float(values.values[values.present].mean()) if values.present.any() else float("nan")
        words = evidence.access is Level.TEXT
        how = f"it tells {1 - mean:.0%} of the forget answers" if words else f"mean loss of the forget answers {mean:.3f}"
        return (
            "Not removed: the target's weights lie in the model unchanged, and what was added to them can be taken away. Without "
            f"it the model answers as the target does ({how})."
        )

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """``forget.taken-apart`` of a model that has parts."""
        if self._is(evidence, label, "beneath"):
            evidence.miss(
                f"{label!r} is the target with an adapter that was not merged: whoever can switch it off has the target. It was "
                "judged with the adapter on; merge it before you give the model away."
            )
        return super().compute(evidence, label) if self.applies(evidence, label) else {}

    def _is(self, evidence: Evidence, label: str, column: str) -> bool:
        return bool(self.column(evidence, label, "forget", column).values.any())


def _of_part(evidence: Evidence, part: Adapter, name: str) -> Floats:
    """What :func:`_of_model` gives, of a part."""
    if evidence.access is not Level.TEXT:
        return score(part, [part.encode(r) for r in evidence.records(name)], batch_tokens=evidence.protocol.batch_tokens).nll()
    alone = Evidence(
        {"part": Subject("part", "unlearned", part.fingerprint(), part)}, evidence.sets, evidence.protocol, evidence.store,
        evidence.progress, offers=evidence.offers, access=evidence.access,
    )  # fmt: skip
    return _of_model(alone, "part", name)


def _of_model(evidence: Evidence, label: str, name: str) -> Floats:
    """Loss of each answer; of words the share that is not told, NaN where an answer has no words."""
    if evidence.access is not Level.TEXT:
        return evidence.scores(label, name).nll()
    found = told(evidence, label, name)
    return np.where(found.present, 1 - found.values, np.nan)


def _present(evidence: Evidence, values: Floats) -> NDArray[np.bool_]:
    """Where there are values: everywhere, but for answers without words."""
    return ~np.isnan(values) if evidence.access is Level.TEXT else np.ones(len(values), dtype=np.bool_)


def every_part(adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """The parts of a model by name, and theirs."""
    for name, part in adapter.parts().items():
        yield name, part
        yield from every_part(part)
