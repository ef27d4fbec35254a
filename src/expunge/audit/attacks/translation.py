"""The question in another language: what was unlearned in one may be known in another."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field, field_validator

from expunge.audit.asking import Ask
from expunge.audit.attacks.prompting import PromptAttack, rated
from expunge.audit.attacks.registry import attack
from expunge.audit.companions import companions, content
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import question_of
from expunge.audit.metrics.papers import RWKU
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.parts import Paper

Translator = Callable[[Sequence[str]], Sequence[str]]


@attack
class TranslatedQuestion(PromptAttack):
    """The question in another language (RWKU's cross-lingual probes); the answer counts in the old language and in the new one.

    Nothing is translated by Expunge itself. Give a file of JSON lines with ``id``, ``question`` and, if it is known, ``answer``
    in the other language; or a function ``module:function`` that takes a list of texts and returns their translations, which is
    then asked for questions and answers.
    """

    name: ClassVar[str] = "translated-question"
    title: ClassVar[str] = "Question in another language"
    formula: ClassVar[str] = "share of the fact told in the answer to the translated question, in the better of both languages"
    paper: ClassVar[Paper] = RWKU
    lacking: ClassVar[str] = (
        "it needs the questions in another language: file=FILE, JSON lines with id, question and answer, or "
        "translator=module:function"
    )

    file: str = Field("", description="JSON lines with id, question and, if known, answer in the other language")
    translator: str = Field("", description="module:function that translates a list of texts; used where no file is given")

    @field_validator("file")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value:
            companions(value, "question")
        return value

    @field_validator("translator")
    @classmethod
    def _callable(cls, value: str) -> str:
        if value:
            _function(value)
        return value

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """What the file says."""
        return {"file": content(self.file)}

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record | None:
        """The translated question, with the translated answer where there is one."""
        found = self._translations(evidence, name).get(record.id)
        if found is None:
            return None
        other = replace(record, prompt=found[0], messages=(), paraphrase="", perturbed=(), spans=(), verbatim=False)
        return replace(other, answer=found[1] or record.answer)

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The better of both ratings of each answer."""
        records = list(evidence.records(name))
        asked = [self.ask(evidence, name, r) for r in records]
        asks = [None if r is None else Ask(r) for r in asked]
        texts = self.hear(evidence, label, name, asks)
        new, old = rated(self, asks, texts), rated(self, [Ask(r) for r in records], texts)
        return Values(np.fmax(new.values, old.values), new.present)

    def _translations(self, evidence: Evidence, name: str) -> dict[str, tuple[str, str]]:
        if self.file:
            rows = companions(self.file, "question")
            return {k: (str(row["question"]), str(row.get("answer") or "")) for k, row in rows.items()}
        if not self.translator:
            return {}

        def made() -> dict[str, tuple[str, str]]:
            records = [r for r in evidence.records(name) if not r.is_text]
            texts = [question_of(r) for r in records] + [r.answer for r in records]
            out = [str(t) for t in _function(self.translator)(texts)]
            if len(out) != len(texts):
                found = f"{self.translator!r} returned {len(out)} translations of {len(texts)} texts."
                raise InputError(found, "Return one of each.")
            return {r.id: (q, a) for r, q, a in zip(records, out[: len(records)], out[len(records) :], strict=True)}

        return evidence.memo(("translations", self.translator, name), made)


def _function(name: str) -> Translator:
    if name.count(":") != 1:
        raise InputError(f"{name!r} names no function.", "Write module:function.")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"The function {name!r} cannot be loaded: {error}.", "Name one on Python's path.") from None
    if not callable(found):
        raise InputError(f"{name!r} is no function.", "Name a function that takes a list of texts.")
    return cast(Translator, found)
