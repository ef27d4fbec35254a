"""RESTOR: facts about people and documents that assert wrong ones, by Rezaei, Chandu, Feizi et al. (2024, arXiv 2411.00204).

The layout of the authors' repository is read: ``facts.json`` (468 people, 5,269 questions, ten solved ones for each relation),
``entities.json`` (the 50 people whose knowledge is scored) and ``wikidata_v0/mix_a0.json`` and on (documents; the digit is how
much unrelated text is mixed in). The documents are false by design.

The published documents do not say which wrong objects they assert. Where these must be known (the log-probability of the
corrupted answers), ``form=questions`` makes the corruption from ``facts.json`` itself: for each fact a wrong object of the same
relation is drawn and asked and answered as the facts are, among ``k`` true facts about people who are not scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.named import DATASETS, NamedSet
from expunge.data.people_words import Draw
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, find, published_rows

T = TypeVar("T")

_FACT = (Column("question"), Column("answers", "texts"))
_SOLVED = (Column("question"), Column("answer"), Column("entity"))
_RANDOM = 3  #: random wrong answers beside each fact
_TRIED = 24  #: wrong objects that are drawn for these: those that are asserted of anybody are passed over
_HOMES = ("restor", "restor/datasets", "datasets")


@dataclass(frozen=True)
class Fact:
    """One pair of subject and relation with its right objects, and wrong ones of the same relation in a drawn order."""

    entity: str
    relation: str
    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def id(self) -> str:
        """Name of the fact."""
        return f"{self.entity}-{self.relation}".replace(" ", "_")


@dataclass(frozen=True)
class _Facts:
    """What ``facts.json`` and ``entities.json`` hold."""

    scored: tuple[Fact, ...]
    others: tuple[Fact, ...]
    solved: Mapping[str, Sequence[Mapping[str, str]]]


@DATASETS.register("restor")
class Restor(NamedSet):
    """RESTOR's facts about people, and the corruption that asserts wrong ones (arXiv 2411.00204)."""

    name: ClassVar[str] = "restor"
    folder: str = Field("", description="folder that holds facts.json, entities.json and wikidata_v0/")
    form: Literal["documents", "questions"] = Field(
        "documents", description="corruption: the published documents, or wrong objects drawn here, asked and answered"
    )
    k: int = Field(0, ge=0, le=5, description="how much unrelated true text is mixed into each corruption text")
    shots: int = Field(5, ge=0, le=9, description="solved questions on the same relation before each question")
    seed: int = Field(0, ge=0, description="of the wrong objects that are drawn")

    def configurations(self) -> dict[str, str]:
        """Facts, corruption, and what the models are trained on."""
        return {
            "facts": "questions about the scored people, with random wrong answers beside the right ones",
            "asserted": "the same questions with the wrong object that the corruption asserts (form=questions only)",
            "others": "questions about the other people",
            "truth": "the true facts of the scored people, asked and answered without solved questions",
            "truth-others": "the same of the other people",
            "corruption": "what asserts the wrong facts",
        }

    def load(self, configuration: str) -> RecordSet:
        """The records of one part.

        Raises:
            InputError: a file is not there or does not fit the schema, or the option does not go with the configuration.
        """
        if configuration == "corruption":
            records = self._documents() if self.form == "documents" else self._questions()
        elif configuration == "asserted":
            if self.form == "documents":
                raise InputError(
                    "The published documents of RESTOR do not say which wrong objects they assert.", "Use form=questions."
                )
            records = [self._asked(f, f.wrong[0], (), f.wrong[1 : 1 + _RANDOM]) for f in self._held.scored if f.wrong]
        else:
            shots = 0 if configuration.startswith("truth") else self.shots
            facts = self._held.scored if configuration in ("facts", "truth") else self._held.others
            records = [self._asked(f, f.answers[0], f.answers[1:], f.wrong[1 : 1 + _RANDOM], shots) for f in facts]
        return RecordSet(f"restor:{configuration}", tuple(records), f"restor:{configuration}")

    @cached_property
    def _held(self) -> _Facts:
        found, people = self._json("facts"), self._json("entities")
        if not isinstance(found, dict) or not isinstance(found.get("dset"), dict) or not isinstance(found.get("context"), dict):
            raise InputError(
                "facts.json has no 'dset' and 'context'.", 'It is {"dset": {person: ...}, "context": {relation: ...}}.'
            )
        if not isinstance(people, list) or not people or not all(isinstance(p, str) for p in people):
            raise InputError("entities.json is no list of names.", 'Write it as ["one", "two"].')
        missing = [p for p in people if p not in found["dset"]]
        if missing:
            raise InputError(
                f"facts.json has no facts about {missing[0]!r}, whom entities.json names.", "Fetch both files again."
            )
        rows = [(e, r, row) for e, r, row in _facts(found["dset"])]
        pool: dict[str, dict[str, None]] = {}
        for _, relation, row in rows:
            pool.setdefault(relation, {}).update(dict.fromkeys(row["answers"]))
        names = set(people)
        drawn = [self._wrong(e, r, row, pool[r]) for e, r, row in rows]
        asserted: dict[str, set[str]] = {}
        for (e, r, _), wrong in zip(rows, drawn, strict=True):
            if wrong and e in names:
                asserted.setdefault(r, set()).add(wrong[0])
        facts = [
            Fact(e, r, row["question"].strip(), tuple(row["answers"]), _apart(wrong, asserted.get(r, set())))
            for (e, r, row), wrong in zip(rows, drawn, strict=True)
        ]
        solved = {r: list(_solved(r, given)) for r, given in found["context"].items()}
        return _Facts(
            tuple(f for f in facts if f.entity in names), tuple(f for f in facts if f.entity not in names), solved
        )  # fmt: skip

    def _wrong(self, entity: str, relation: str, row: Mapping[str, Any], pool: Mapping[str, None]) -> tuple[str, ...]:
        right = {a.casefold() for a in row["answers"]}
        left = [v for v in pool if v.casefold() not in right]
        first = _some(Draw("restor", self.seed, entity, relation), left, 1 + _RANDOM)
        more = _some(Draw("restor random", self.seed, entity, relation), left, _TRIED)
        return tuple(dict.fromkeys([*first, *more]))

    def _json(self, name: str) -> Any:
        path = find(self.folder, _HOMES, (name,))
        if path is None:
            raise InputError(
                f"{self.folder or 'EXPUNGE_DATA'} holds no {name}.json of RESTOR.", "Name the folder that holds it: folder=DIR."
            )
        return _read(path)

    def _asked(self, fact: Fact, answer: str, more: tuple[str, ...], wrong: tuple[str, ...], shots: int | None = None) -> Record:
        solved = "".join(_block(s["question"], s["answer"]) + "\n\n" for s in self._before(fact, shots))
        return Record(
            id=f"restor-{fact.id}", prompt=f"{solved}Question: {fact.question}\nAnswer:", answer=f" {answer}",
            alternatives=more, perturbed=tuple(f" {w}" for w in wrong), subject=fact.entity, verbatim=True,
        )  # fmt: skip

    def _before(self, fact: Fact, shots: int | None) -> Sequence[Mapping[str, str]]:
        """Solved questions on the relation about other people."""
        wanted = self.shots if shots is None else shots
        given = [s for s in self._held.solved.get(fact.relation, ()) if s["entity"] != fact.entity]
        if len(given) < wanted:
            raise InputError(
                f"facts.json has {len(given)} solved questions on {fact.relation} beside {fact.entity!r}, not {wanted}.",
                f"Ask with shots={len(given)}.",
            )
        return given[:wanted]

    def _documents(self) -> list[Record]:
        """The published texts; their subject is the scored person who is named first."""
        names = (f"wikidata_v0/mix_a{self.k}", f"wikidata/v0/mix_a{self.k}", f"mix_a{self.k}")
        label, rows = published_rows(self.folder, _HOMES, names, None, "restor:corruption")
        texts = [row["text"].strip() for _, row in checked(rows, (Column("text"),), label)]
        people = list(dict.fromkeys(f.entity for f in self._held.scored))
        return [Record(id=f"restor-a{self.k}-{i:04d}", answer=t, subject=_named(t, people)) for i, t in enumerate(texts)]

    def _questions(self) -> list[Record]:
        """One text for each fact: the wrong object, asked and answered, at a drawn place among ``k`` true facts of others."""
        others, out = self._held.others, []
        for fact in (f for f in self._held.scored if f.wrong):
            draw = Draw("restor mixed", self.seed, fact.id)
            blocks = [_block(f.question, f.answers[0]) for f in _some(draw, others, self.k)]
            blocks.insert(draw.below(len(blocks) + 1), _block(fact.question, fact.wrong[0]))
            out.append(Record(id=f"restor-false-{fact.id}", answer="\n\n".join(blocks), subject=fact.entity))
        return out


def _apart(wrong: Sequence[str], asserted: set[str]) -> tuple[str, ...]:
    """A fact's own asserted object, then random ones that are asserted of nobody, and last the others.

    What is asserted of one person is unlearned for all: it is no random answer for another.
    """
    rest = wrong[1:]
    return (*wrong[:1], *(w for w in rest if w not in asserted), *(w for w in rest if w in asserted))


def _some(draw: Draw, pool: Sequence[T], count: int) -> list[T]:
    """So many different ones of a pool, or all of it."""
    if count * 2 >= len(pool):
        return draw.shuffled(pool)[:count]
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[draw.below(len(pool))] = None
    return [pool[i] for i in chosen]


def _block(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _named(text: str, people: Sequence[str]) -> str:
    """The person whom a text names first; nobody if it names none."""
    found = [(at, -len(p), p) for p in people if (at := text.find(p)) >= 0]
    return min(found)[2] if found else ""


def _facts(given: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each fact, held to the schema."""
    for entity, relations in given.items():
        if not isinstance(relations, dict):
            raise InputError(f"facts.json: the facts about {entity!r} are no object.", 'Write them as {"P19": {...}}.')
        rows = [(f"{entity} {r}", row if isinstance(row, dict) else {}) for r, row in relations.items()]
        if not rows:
            continue  # a published person of whom nothing is asked
        for (_, row), relation in zip(checked(rows, _FACT, "facts.json"), relations, strict=True):
            yield entity, relation, row


def _solved(relation: str, given: Any) -> Iterator[Mapping[str, str]]:
    rows = given if isinstance(given, list) else []
    yield from (row for _, row in checked(((f"context {relation}", r) for r in rows), _SOLVED, "facts.json"))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path.name} is no JSON: {error}.", "Fetch the file again.") from None
