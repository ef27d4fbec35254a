"""ORT: is unlearning independent of the form of the knowledge? After the paper of that question (2025, arXiv 2506.07795).

Facts are there in several forms (question, the question in other words, statement, choice, reversed, true or false). The target
has learnt all of them. They are unlearned in *one* form, and all are asked: ``g_e`` is the share of what could be forgotten in
form e that was, measured against models retrained without the facts in any form (or against chance where there is none, as for
facts from pretraining), and the form-dependent bias ``FDB = g_trained - mean of the other g_e``: 0 where the fact was unlearned,
1 where only its trained form was. The course ``matrix`` unlearns in each form in turn and gives the whole table.

The paper's exact tasks and formula are not public in full: forms, ``g_e`` and its normalisation are a reconstruction here. Forms
in which the target does not stand out are left out, and said. The facts are generated, or yours: ``forget.jsonl`` and
``retain.jsonl`` with any forms (:mod:`expunge.data.sets.forms`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Course, Roles, Source, Training, benchmark, where
from expunge.core.errors import unknown
from expunge.data.sets.forms import FORMS, Forms, facts
from expunge.engine.parts import Paper

_PER_FORM = 4  #: facts about each person of the sample


@benchmark
class OrtBenchmark(Benchmark):
    """The same facts in several forms: forgotten, or only no longer told when asked in the form that was unlearned?"""

    name: ClassVar[str] = "ort"
    title: ClassVar[str] = "ORT: unlearning and the form of the knowledge"
    paper: ClassVar[Paper] = papers.ORT
    licence: ClassVar[str] = "generated; of files of your own, theirs"
    home: ClassVar[str] = "generated here; a folder with forget.jsonl and retain.jsonl"
    caveats: ClassVar[tuple[str, ...]] = (
        "Tasks and formula are a reconstruction: numbers cannot be compared with the paper's.",
        "Damage forgets all forms alike, at a bias of 0: read the kept facts beside it.",
    )

    trained: str = Field("question", description="the form in which the facts are unlearned")
    forms: str = Field(FORMS, description="all forms, with commas")
    choices: str = Field("choice,true-false", description="forms that are answered by a choice, with commas; they need 'wrong'")
    answer_tokens: int = Field(32, ge=1, description="longest answer, in tokens")
    people: int = Field(8, ge=1, le=40, description="generated people whose facts are to be forgotten")
    kept: int = Field(16, ge=1, le=40, description="generated people whose facts are to be kept")
    facts: int = Field(6, ge=1, le=10, description="generated facts about each of them")
    seed: int = Field(1, ge=0, description="of the generated people")

    @model_validator(mode="after")
    def _known(self) -> OrtBenchmark:
        for name in (self.trained, *self._choices()):
            if name not in self._names():
                raise unknown("form", name, self._names())
        return self

    def _names(self) -> list[str]:
        return Forms(forms=self.forms).names()

    def _choices(self) -> tuple[str, ...]:
        """The forms that are chosen from."""
        return tuple(c for c in (p.strip() for p in self.choices.split(",")) if c)

    def sources(self) -> Mapping[str, Source]:
        """Each side in all forms together and in each."""
        own = {"people": self.people, "kept": self.kept, "facts": self.facts, "seed": self.seed}
        query = where(self.data, forms=self.forms, **({} if self.data else own))
        listed = Forms(forms=self.forms).configurations()
        return {name.replace("-", "_"): Source(f"forms:{name}{query}", text) for name, text in listed.items()}

    def learnt(self) -> Sequence[str]:
        """All forms of all facts."""
        return ("forget_all", "retain_all")

    def trainings(self) -> Sequence[Training]:
        """All facts in all forms, in equal parts."""
        parts = {"schedule": {"name": "fixed", "lr": 1e-5, "epochs": 5, "batch": 32, "warmup": 1, "decay": "linear"}}
        return (Training("target", ("forget_all", "retain_all"), parts, "any"),)

    def roles(self) -> Roles:
        """One form is unlearned, and kept of the other facts; a retrained model has seen the facts in no form."""
        return Roles(_set("forget", self.trained), _set("retain", self.trained), without=("forget_all",))

    def axes(self) -> Sequence[Axis]:
        """Bias, least, share of each form; then what is told in each form of what is to be forgotten and of what is kept."""
        names, chosen = self._names(), self._choices()
        sets = {n: _set("forget", n) for n in names}
        options = {"trained": self.trained, "choices": chosen, "max_new_tokens": self.answer_tokens}
        key, group = "form-forgetting", f"Forgetting, unlearned as {self.trained}"
        out = [
            Axis("fdb", "Form-dependent bias", key, sets, key, options, group=group),
            Axis("least", "Form that is forgotten least", key, sets, f"{key}.least", options, group=group),
            *(Axis(f"g-{n}", f"Forgotten as {n}", key, sets, f"{key}.{n}", options, group=group) for n in names),
        ]
        told = {"max_new_tokens": self.answer_tokens}
        for side, title in (("forget", "To forget"), ("retain", "Kept")):
            for n in names:
                metric, settings = ("option-accuracy", {"over": "mean"}) if n in chosen else ("fact-told", told)
                out.append(
                    Axis(
                        f"{side}-{n}", f"Told as {n}", metric, {side: _set(side, n)}, f"{side}.{metric}", settings,
                        group=f"{title}: share that is told",
                    )
                )  # fmt: skip
        return out

    def courses(self) -> Sequence[Course]:
        """Each form is unlearned in turn, and all are asked."""
        names = self._names()
        return (
            Course(
                "matrix", "each", tuple(_set("forget", n) for n in names), ("fdb", "least", *(f"g-{n}" for n in names)),
                "what is forgotten in each form (columns) by unlearning in one (rows)",
                labels=tuple(names), options=tuple({"trained": n} for n in names),
            ),
        )  # fmt: skip

    def small(self) -> Mapping[str, Any]:
        """Few people."""
        return {"people": 3, "kept": 6, "facts": _PER_FORM, "answer_tokens": 16}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Generated facts as files of the schema."""
        folder.mkdir(parents=True, exist_ok=True)
        made = facts(9, _PER_FORM, seed + 1)
        for side, rows in (("forget", made[: 3 * _PER_FORM]), ("retain", made[3 * _PER_FORM :])):
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            (folder / f"{side}.jsonl").write_text(lines, encoding="utf-8")


def _set(side: str, form: str) -> str:
    """Name of a set."""
    return f"{side}_{form.replace('-', '_')}"
