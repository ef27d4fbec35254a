"""The same knowledge in other forms: what was unlearned as a question may still be there as a sentence, a choice, a reversal.

Each form has its own score with its own chance level, so forms are compared as shares of what could be forgotten
(:mod:`~expunge.audit.attacks.form_bias`).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.audit.asking import Ask, asking, encoded
from expunge.audit.attacks.prompting import PromptAttack
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import BLANK, blanked, question_of, statements, stem_of, subject_names
from expunge.audit.generations import seed_of
from expunge.audit.metrics.papers import ORT, RWKU
from expunge.audit.metrics.registry import Range
from expunge.audit.metrics.rouge import lacks_questions
from expunge.audit.scores import Floats, score
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.parts import Paper


class FormAttack(PromptAttack):
    """A form of the fact that is answered in words."""

    criterion: ClassVar[Criterion] = Criterion.FORM
    paper: ClassVar[Paper] = ORT


@attack
class ParaphrasedQuestion(FormAttack):
    """The question in other words, as the data have it."""

    name: ClassVar[str] = "paraphrased-question"
    title: ClassVar[str] = "Question in other words"
    formula: ClassVar[str] = "share of the fact told in the answer to the paraphrase of the question"
    lacking: ClassVar[str] = "no record has its question in other words (question_paraphrase)"

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record | None:
        """The paraphrase of the question."""
        other = record.question_paraphrase
        return asking(record, other) if other and other != question_of(record) else None


def named_in(evidence: Evidence) -> Mapping[str, str]:
    """How the questions of all sets call their subjects, by the id of the record."""
    records = (r for n in evidence.sets for r in evidence.records(n) if isinstance(r, Record))
    return evidence.memo(("subject names",), lambda: subject_names(records))


def _rest(record: Record, gold: str) -> Record:
    """A record that is rated by ``gold`` alone."""
    return replace(record, answer=gold, paraphrase="", perturbed=(), spans=())


@attack
class Cloze(FormAttack):
    """The answer as a sentence with a blank in the place of the words that carry the fact (RWKU's fill-in-the-blank)."""

    name: ClassVar[str] = "cloze"
    title: ClassVar[str] = "Fill in the blank"
    formula: ClassVar[str] = "share of the missing words told in the answer to: demand + sentence with ___"
    paper: ClassVar[Paper] = RWKU
    lacking: ClassVar[str] = "no answer has words beside its fact"

    demand: str = Field(
        "Please complete the blank in the following sentence. ", description="what is put before the sentence with the blank"
    )

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record | None:
        """The sentence with its blank."""
        sentence, missing = blanked(record)
        if not missing or not sentence.replace(BLANK, "").strip(" ."):
            return None
        return _rest(replace(record, messages=(), prompt=self.demand + sentence), missing)


@attack
class StatementCompletion(FormAttack):
    """The answer as running text, without question and template, up to the first word of its fact; the model goes on.

    An answer that begins with its fact, or that only follows from its question ("It was on ..."), is no statement: there the
    model has to be asked otherwise.
    """

    name: ClassVar[str] = "statement-completion"
    title: ClassVar[str] = "Completion of a statement"
    formula: ClassVar[str] = "share of the fact told in what follows the beginning of the statement"
    lacking: ClassVar[str] = "every answer begins with its fact"

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record | None:
        """The beginning of the statement as plain text."""
        stem, rest = stem_of(record)
        named = named_in(evidence).get(record.id, "")
        if not stem or (named and named not in stem):
            return None
        return replace(_rest(record, " " + rest), messages=(), prompt=stem, verbatim=True)


@attack
class Reversed(FormAttack):
    """The fact is given and the subject is asked for (RWKU's reverse query)."""

    name: ClassVar[str] = "reversed"
    title: ClassVar[str] = "Reversed question"
    formula: ClassVar[str] = "share of the subject's name told in the answer to: who is meant? + the answer without the name"
    paper: ClassVar[Paper] = RWKU
    lacking: ClassVar[str] = "it cannot be told from the questions what their subjects are called"

    demand: str = Field("Who is meant by ___ in this sentence? ", description="what is put before the sentence")

    def ask(self, evidence: Evidence, name: str, record: Record) -> Record | None:
        """The answer (or its paraphrase) with a blank in the place of the name."""
        named = named_in(evidence).get(record.id, "")
        sentence = next((s for s in (record.answer, record.paraphrase) if named and named in s), "")
        if not sentence:
            return None
        return _rest(replace(record, messages=(), prompt=self.demand + sentence.replace(named, BLANK)), named)


# ---- forms that are read from log-probabilities


@dataclass(frozen=True)
class Choice:
    """Prompts with an answer each, of which the first is the right one (or belongs to the right statement)."""

    asked: tuple[tuple[Record, str], ...]


class ChoiceAttack(Attack):
    """A form in which a model chooses, read from the log-probabilities of what it could say.

    A subclass says what could be said (:meth:`options`) and how the log-probabilities become a value that is 0 at chance and 1
    for knowledge (:meth:`value`).
    """

    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.FORM
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES})
    range: ClassVar[Range] = (-1.0, 1.0)
    lacking: ClassVar[str] = "no record has wrong answers (perturbed)"

    @abc.abstractmethod
    def options(self, evidence: Evidence, name: str, record: Record) -> Choice | None:
        """What a model may say, or nothing where the record has no wrong answers."""

    @abc.abstractmethod
    def value(self, logp: Floats) -> float:
        """From the log-probability of each option."""

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Wrong answers, and a question."""
        lacking = lacks_questions(evidence, name)
        if lacking or any(self.options(evidence, name, r) for r in evidence.records(name)):
            return lacking
        return self.lacking

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The value of each record, from one forward pass per option."""
        records = list(evidence.records(name))
        adapter, at = evidence.adapter(label), evidence.protocol
        examples: list[Example] = []
        owners: list[int] = []
        for i, record in enumerate(records):
            made = self._encoded(evidence, name, record, adapter)
            examples += made
            owners += [i] * len(made)
        found = score(
            adapter, examples, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=at.batch_tokens, shard_examples=at.shard_examples, progress=evidence.progress,
            what=f"{label}: {self.title}",
        )  # fmt: skip
        logp, owner = self.logp(found.nll(), found.counts), np.array(owners, dtype=np.int64)
        values = np.full(len(records), np.nan)
        for i in np.unique(owner):
            values[i] = self.value(logp[owner == i])
        return Values(values, np.isin(np.arange(len(records)), owner))

    def logp(self, nll: Floats, counts: npt.NDArray[np.int64]) -> Floats:
        """The log-probability that is compared: the mean over tokens, so that long options are as good as short ones."""
        return -nll

    def _encoded(self, evidence: Evidence, name: str, record: Record, adapter: Adapter) -> list[Example]:
        choice = self.options(evidence, name, record)
        if choice is None:
            return []
        try:
            return [
                encoded(adapter, Ask(replace(r, answer=text, spans=())), f"#{self.name}{k}")
                for k, (r, text) in enumerate(choice.asked)
            ]
        except InputError as error:
            evidence.miss(f"Not every record could be asked by {self.name} on the {name} set: {error.message}")
            return []


@attack
class MultipleChoice(ChoiceAttack):
    """The right answer among the wrong ones: which one is the likeliest?

    The options are written into the prompt (in an order that follows from the record's id), as a reader would get them, or not:
    then only their likelihood after the plain question counts. Read is the mean log-probability of each option's text, not of
    a letter: letters are lost with the format before the knowledge is.
    """

    name: ClassVar[str] = "multiple-choice"
    title: ClassVar[str] = "Multiple choice"
    formula: ClassVar[str] = "(hit - 1/n) / (1 - 1/n): 1 if the right one of n options is the likeliest, shared on a tie"
    paper: ClassVar[Paper] = ORT
    passes: ClassVar[str] = "one pass per option"

    listed: bool = Field(True, description="whether the options stand in the prompt")
    limit: int = Field(3, ge=1, description="wrong options at most")

    def options(self, evidence: Evidence, name: str, record: Record) -> Choice | None:
        """The right statement and wrong ones of the same form."""
        right, wrong = statements(record)
        texts = list(dict.fromkeys([right, *wrong]))[: self.limit + 1]
        if len(texts) < 2:
            return None
        asked = asking(record, self._prompt(record, texts)) if self.listed else record
        return Choice(tuple((asked, t) for t in texts))

    def _prompt(self, record: Record, texts: Sequence[str]) -> str:
        order = np.random.default_rng(seed_of(record.id)).permutation(len(texts))
        listed = " ".join(f"({chr(ord('A') + k)}) {texts[int(i)]}" for k, i in enumerate(order))
        return f"{question_of(record)} Choose one: {listed}"

    def value(self, logp: Floats) -> float:
        """Whether the first option is the likeliest, chance taken away."""
        best = logp >= logp.max()
        hit = float(best[0]) / float(best.sum())
        return (hit - 1 / len(logp)) / (1 - 1 / len(logp))


@attack
class YesNo(ChoiceAttack):
    """Is this true? - asked of the right statement and of wrong ones.

    Read is how much more "yes" than "no" is preferred for the right statement than for a wrong one, so a model that says yes, or
    no, to everything is at chance.
    """

    name: ClassVar[str] = "yes-no"
    title: ClassVar[str] = "True or false"
    formula: ClassVar[str] = "2 mean_i [yes-no margin(right) > margin(wrong_i)] - 1"
    paper: ClassVar[Paper] = ORT
    passes: ClassVar[str] = "two passes per statement"

    demand: str = Field("Is this statement true? Answer yes or no. ", description="what is put before a statement")
    yes: str = Field("Yes", min_length=1, description="the answer that affirms")
    no: str = Field("No", min_length=1, description="the answer that denies")
    limit: int = Field(3, ge=1, description="wrong statements at most")

    def options(self, evidence: Evidence, name: str, record: Record) -> Choice | None:
        """Both answers to the right statement, then to the wrong ones."""
        right, wrong = statements(record)
        texts = list(dict.fromkeys([right, *wrong]))[: self.limit + 1]
        if len(texts) < 2:
            return None
        return Choice(tuple((asking(record, self.demand + t), a) for t in texts for a in (self.yes, self.no)))

    def logp(self, nll: Floats, counts: npt.NDArray[np.int64]) -> Floats:
        """The log-probability of the whole answer: yes and no are short, and each is one thing to say."""
        return -nll * counts

    def value(self, logp: Floats) -> float:
        """Share of the wrong statements that are affirmed less than the right one, chance taken away."""
        margins = logp[0::2] - logp[1::2]
        return float(np.mean(np.sign(margins[0] - margins[1:])))
