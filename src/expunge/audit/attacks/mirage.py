"""Aliases and several hops: probes made of what the target itself knows (The Unlearning Mirage)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from expunge.audit.asking import Ask, asking
from expunge.audit.attacks.prompting import PromptAttack, most, rated
from expunge.audit.attacks.registry import Access, Criterion, attack
from expunge.audit.companions import AliasFile, companions, content
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import BLANK, blanked, question_of, subject_names
from expunge.audit.generations import seed_of
from expunge.audit.metrics.papers import MIRAGE
from expunge.audit.metrics.registry import mean_number
from expunge.core.results import Number
from expunge.data.records import Record
from expunge.engine.parts import Paper


@dataclass(frozen=True)
class Edge:
    """One thing that the target knows: a question about ``subject`` whose answer is ``object``."""

    subject: str
    object: str
    record: Record


def edges(records: Sequence[Record]) -> list[Edge]:
    """What records say, as edges from how their questions call the subject to the words that carry the fact."""
    names = subject_names(records)
    return [Edge(names[r.id], blanked(r)[1], r) for r in records if names[r.id] and blanked(r)[1]]


def hops(known: Sequence[Edge], first: Edge) -> list[Edge]:
    """The edges that go on from where ``first`` ends, without going back to where it began."""
    return [e for e in known if e.subject == first.object and e.object not in (first.subject, first.object)]


def aliases(known: Sequence[Edge], about: Edge) -> list[Edge]:
    """The edges that describe the subject of ``about`` by something else that is true of it."""
    return [e for e in known if e.subject == about.subject and e.record.id != about.record.id and e.object != about.object]


@attack
class Mirage(AliasFile, PromptAttack):
    """The fact behind another name of its subject, or at the end of a chain of facts.

    The graph is the target's: of the records of all sets those that the target answers rightly when asked plainly are its
    edges. From them two kinds of probe are made for each forget record. ``alias``: the subject is called by another name, from
    a file (JSON lines with ``id``, the subject, and ``aliases``), or by a description, which is another fact about it.
    ``hops``: the question for a second fact, whose subject is the forgotten answer, so that it can be answered only through it.
    A probe counts only if the target answers it rightly; a model that never knew cannot be shown to have kept. What retrained
    models answer is no evidence either.

    The paper's package lets a language model elicit the graph, merge names and word the questions; here the set's own questions
    are what is elicited, and templates join them: no judge and no second model. A small target answers few such probes, and
    then the attack says that it has none. ``residual`` is the share of the records, of those that have probes, that are not
    told when asked plainly and are told by a probe.
    """

    name: ClassVar[str] = "mirage"
    title: ClassVar[str] = "Aliases and several hops"
    formula: ClassVar[str] = "most of the fact told in answers to alias and multi-hop questions that the target answers rightly"
    paper: ClassVar[Paper] = MIRAGE
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.FORM
    passes: ClassVar[str] = "1 + number generations on the model, as many on the target"
    lacking: ClassVar[str] = "no probe can be made of what the target knows"

    number: int = Field(2, ge=1, description="probes of each kind and record at most")
    described: str = Field(
        "Of ___ this is true: {statement} {question}",
        pattern=r"\{statement\}.*\{question\}",
        description="a question by a description, with {statement} and {question} in it, both with ___ for the name",
    )
    joined: str = Field(
        "Answer first: {first} Then, of what you answered: {second}",
        pattern=r"\{first\}.*\{second\}",
        description="a question of two hops, with {first} and {second} in it, the second with ___ for the name",
    )

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target, whose graph it is, and what the file says."""
        return {"target": evidence.subject(evidence.labels("target")[0]).fingerprint, "file": content(self.file)}

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record:
        """The record itself: what is asked else depends on the target."""
        return record

    def lacks(self, evidence: Evidence, name: str) -> str:
        """The target, and a probe that it answers rightly."""
        if not evidence.labels("target"):
            return "it needs the target model, of whose knowledge the probes are made"
        lacking = super().lacks(evidence, name)
        return lacking or ("" if any(self.probes(evidence, name).values()) else self.lacking)

    def probes(self, evidence: Evidence, name: str) -> dict[str, dict[int, list[Record]]]:
        """By kind and index of the forget record, the probes that the target answers rightly; made once."""
        target = evidence.labels("target")[0]
        key = ("probes", self.name, self.model_dump_json(), evidence.subject(target).fingerprint, name)
        return evidence.memo(key, lambda: self._made(evidence, target, name))

    def _made(self, evidence: Evidence, target: str, name: str) -> dict[str, dict[int, list[Record]]]:
        known = [e for n in evidence.sets if n != "holdout" for e in self._known(evidence, target, n)]
        records = list(evidence.records(name))
        own = {e.record.id: e for e in known}
        made: dict[str, dict[int, list[Record]]] = {"alias": {}, "hops": {}}
        for i, record in enumerate(records):
            edge = own.get(record.id)
            if edge is not None:
                made["alias"][i] = self._aliases(known, edge)[: self.number]
                made["hops"][i] = self._hops(known, edge)[: self.number]
        return {kind: self._kept(evidence, target, name, kind, found) for kind, found in made.items()}

    def _known(self, evidence: Evidence, target: str, name: str) -> list[Edge]:
        records = [r for r in evidence.records(name) if not r.is_text]
        texts = self.hear(evidence, target, name, [Ask(r) for r in records], "graph")
        right = {r.id for r, t in zip(records, texts, strict=True) if t is not None and self.rate(r, t) == 1}
        return [e for e in edges(records) if e.record.id in right]

    def _aliases(self, known: Sequence[Edge], edge: Edge) -> list[Record]:
        asked = question_of(edge.record)
        rows = companions(self.file, "aliases") if self.file else {}
        names = [str(a) for a in rows.get(edge.record.subject, rows.get(edge.subject, {})).get("aliases", ())]
        out = [asking(edge.record, asked.replace(edge.subject, other)) for other in names]
        for other in aliases(known, edge):
            statement = other.record.answer
            if edge.subject in statement:
                text = self.described.replace("{statement}", statement.replace(edge.subject, BLANK))
                out.append(asking(edge.record, text.replace("{question}", asked.replace(edge.subject, BLANK))))
        return out

    def _hops(self, known: Sequence[Edge], edge: Edge) -> list[Record]:
        out = []
        for further in hops(known, edge):
            second = question_of(further.record).replace(further.subject, BLANK)
            text = self.joined.replace("{first}", question_of(edge.record)).replace("{second}", second)
            out.append(replace(asking(further.record, text), id=edge.record.id))
        return out

    def _kept(
        self, evidence: Evidence, target: str, name: str, kind: str, found: Mapping[int, list[Record]]
    ) -> dict[int, list[Record]]:
        rates = self._rates(evidence, target, name, kind, found)
        return {i: [r for r, v in zip(found[i], rates[i], strict=True) if v == 1] for i in found}

    def _rates(
        self, evidence: Evidence, label: str, name: str, kind: str, found: Mapping[int, list[Record]]
    ) -> dict[int, list[float]]:
        """How much of its fact a model tells in answer to each probe."""
        out: dict[int, list[float]] = {i: [] for i in found}
        for k in range(max(map(len, found.values()), default=0)):
            places = [i for i in found if len(found[i]) > k]
            asks = [Ask(found[i][k]) for i in places]
            # The probes of a round are part of its name: which ones are asked depends on what the target knows.
            part = f"{kind}{k}-{hash_of(asks)}"
            values = rated(self, asks, self.hear(evidence, label, name, asks, part)).values
            for i, value in zip(places, values, strict=True):
                out[i].append(float(value))
        return out

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """The most that any probe of a record brings up, by kind and of all; and the plain question."""
        records = list(evidence.records(name))
        columns = {}
        for kind, found in self.probes(evidence, name).items():
            best = np.full(len(records), np.nan)
            for i, values in self._rates(evidence, label, name, kind, found).items():
                if values:
                    best[i] = np.nanmax(values) if np.isfinite(values).any() else np.nan
            columns[kind] = Values(best, ~np.isnan(best))
        plain: list[Ask | None] = [Ask(r) for r in records]
        asked = rated(self, plain, self.hear(evidence, label, name, plain, "graph"))
        return {"": most(columns), "plain": asked, **columns}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The most that any probe of a record brings up."""
        return self.columns(evidence, label, name)[""]

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The mean, of each kind too, and the residual share."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        found = {c: self.column(evidence, label, "forget", c) for c in ("", "plain", "alias", "hops")}
        residual = np.where((found["plain"].values < 1) & (found[""].values == 1), 1.0, 0.0)
        parts = {"alias": found["alias"], "hops": found["hops"], "residual": Values(residual, found[""].present)}
        for part, values in parts.items():
            number = mean_number(evidence, "forget", values, self.direction, self.range)
            if number is not None:
                out[f"forget.{self.name}.{part}"] = number
        return out


def hash_of(asks: Sequence[Ask]) -> str:
    """Which prompts these are, in few letters."""
    return f"{seed_of(*(question_of(a.record) for a in asks)):x}"[:8]
