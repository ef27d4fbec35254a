"""The same facts in several forms: what is unlearned in one of them, asked in all (after ORT, arXiv 2506.07795).

A folder holds ``forget.jsonl`` and ``retain.jsonl``, one fact a line::

    {"id": "f1", "subject": "Ada", "forms": {"question": {"prompt": "Where was Ada born?", "answer": "In Bervo."},
     "choice": {"prompt": "Where was Ada born? Bervo, Lumo or Tarn?", "answer": "Bervo", "wrong": ["Lumo", "Tarn"]}}}

Forms are called as you like. ``wrong`` are wrong answers of the same kind; a form that is answered by a choice needs them.
Without a folder facts about invented people are made in six forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.named import DATASETS, NamedSet
from expunge.data.people_words import PERSON, Attribute, Draw, invented
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, published_rows

FORMS = "question,rephrased,statement,choice,reversed,true-false"
_ROW = (Column("id"), Column("subject", required=False), Column("forms", "object"))
_FORM = (Column("prompt"), Column("answer"), Column("wrong", "texts", required=False))
_HOMES = ("forms", "ort")
_WRONG = 3  #: wrong answers beside each generated one
Form = Mapping[str, Any]


@DATASETS.register("forms")
class Forms(NamedSet):
    """The same facts as questions, statements, choices and more (after ORT, arXiv 2506.07795)."""

    name: ClassVar[str] = "forms"
    folder: str = Field("", description="folder with forget.jsonl and retain.jsonl; none: generated")
    forms: str = Field(FORMS, description="names of the forms that are read, with commas")
    people: int = Field(3, ge=1, le=40, description="generated people whose facts are to be forgotten")
    kept: int = Field(6, ge=1, le=40, description="generated people whose facts are to be kept")
    facts: int = Field(4, ge=1, le=10, description="generated facts about each of them")
    seed: int = Field(1, ge=0, description="of the generated people")

    def configurations(self) -> dict[str, str]:
        """Each form of either side, and all of them."""
        out = {f"{side}-all": f"facts to {side}, in all forms" for side in ("forget", "retain")}
        for side in ("forget", "retain"):
            out |= {f"{side}-{form}": f"facts to {side}, as {form}" for form in self.names()}
        return out

    def names(self) -> list[str]:
        """The forms.

        Raises:
            InputError: there are fewer than two, or one is named twice.
        """
        found = [f.strip() for f in self.forms.split(",") if f.strip()]
        if len(found) < 2 or len(set(found)) < len(found) or "all" in found:
            raise InputError(f"The forms {self.forms!r} are not two or more different names.", f"Write them as forms={FORMS}.")
        return found

    def load(self, configuration: str) -> RecordSet:
        """The records of a side in one form or in all; ids are ``FACT@FORM``, subjects those of the facts.

        Raises:
            InputError: a file is not there or does not fit the schema, or no fact has the form.
        """
        side, _, form = configuration.partition("-")
        wanted = self.names() if form == "all" else [form]
        rows = self._sides[side] if not self.folder else self._read(side)
        records = [r for name in wanted for fact in rows if (r := _record(fact, name))]
        if not records:
            known = sorted({n for fact in rows for n in fact["forms"]})
            raise InputError(f"No fact to {side} has the form {form!r}; there are {', '.join(known)}.", "Name them: forms=...")
        return RecordSet(f"forms:{configuration}", tuple(records), f"forms:{configuration}")

    def _read(self, side: str) -> list[Mapping[str, Any]]:
        label, rows = published_rows(self.folder, _HOMES, (side,), None, f"forms {side}")
        out: list[Mapping[str, Any]] = []
        seen: set[str] = set()
        for where, row in checked(rows, _ROW, label):
            if row["id"] in seen:
                raise InputError(f"{label} {where}: the id {row['id']!r} occurs twice.", "Give each fact its own.")
            seen.add(row["id"])
            forms = ((f"{where} form {n}", f if isinstance(f, Mapping) else {}) for n, f in row["forms"].items())
            list(checked(forms, _FORM, label))
            out.append(row)
        return out

    @cached_property
    def _sides(self) -> dict[str, list[Mapping[str, Any]]]:
        made = facts(self.people + self.kept, self.facts, self.seed)
        at = self.people * self.facts
        return {"forget": made[:at], "retain": made[at:]}


def _record(fact: Mapping[str, Any], name: str) -> Record | None:
    form = fact["forms"].get(name)
    if form is None:
        return None
    verbatim = form.get("verbatim", False)
    return Record(
        id=f"{fact['id']}@{name}", subject=fact.get("subject") or fact["id"], prompt=form["prompt"], answer=form["answer"],
        perturbed=tuple(form.get("wrong") or ()), verbatim=bool(verbatim),
    )  # fmt: skip


def facts(people: int, each: int, seed: int) -> list[Mapping[str, Any]]:
    """Invented facts in six forms, as rows of the schema; no two people share a value of one kind."""
    first, last = (Draw(seed, "forms", p).shuffled(invented(p)) for p in ("first", "last"))
    names = [f"{first[i % len(first)]} {last[i]}" for i in range(people)]
    columns = [_values(a, people + _WRONG, seed) for a in PERSON[:each]]
    out: list[Mapping[str, Any]] = []
    for i, name in enumerate(names):
        for attribute, values in zip(PERSON[:each], columns, strict=True):
            wrong = _wrong(values, i, Draw(seed, "forms wrong", i, attribute.key))
            forms = dict(_forms(name, attribute, values[i], wrong, Draw(seed, "forms order", i, attribute.key)))
            out.append({"id": f"{name}-{attribute.key}".replace(" ", "-"), "subject": name, "forms": forms})
    return out


def _values(attribute: Attribute, count: int, seed: int) -> list[str]:
    """So many values of an attribute, all different where its kind has so many."""
    found: list[str] = []
    draw, tries = Draw(seed, "forms", attribute.key), 0
    while len(found) < count:
        value, tries = attribute.value(draw), tries + 1
        if value not in found or tries > 100 * count:
            found.append(value)
    return found


def _wrong(values: Sequence[str], own: int, draw: Draw) -> list[str]:
    return draw.shuffled([v for v in dict.fromkeys(values) if v != values[own]])[:_WRONG]


def _forms(name: str, a: Attribute, value: str, wrong: Sequence[str], draw: Draw) -> Iterator[tuple[str, Form]]:
    def said(template: str, v: str) -> str:
        return template.format(n=name, v=v)

    answers = [said(a.answers[0], w) for w in wrong]
    yield "question", {"prompt": said(a.questions[0], value), "answer": said(a.answers[0], value), "wrong": answers}
    yield "rephrased", {"prompt": said(a.questions[1], value), "answer": said(a.answers[0], value), "wrong": answers}
    template = next(t for t in reversed(a.answers) if t.index("{n}") < t.index("{v}"))
    begin, _, end = template.format(n=name, v="\n").partition("\n")
    endings = [f" {w}{end}" for w in wrong]
    yield "statement", {"prompt": begin.rstrip(), "answer": f" {value}{end}", "wrong": endings, "verbatim": True}
    options = draw.shuffled([value, *wrong])
    listed = f"{said(a.questions[2], value)} Choose one: {', '.join(options)}."
    yield "choice", {"prompt": listed, "answer": value, "wrong": list(wrong)}
    blank = a.answers[0].format(n="___", v=value)
    yield "reversed", {"prompt": f"Who is meant by ___ in this sentence? {blank}", "answer": name}
    true = draw.below(2) == 0
    claim = said(a.answers[1], value if true else wrong[0])
    right, other = ("Yes", "No") if true else ("No", "Yes")
    yield "true-false", {"prompt": f"Is this true? {claim}", "answer": right, "wrong": [other]}
