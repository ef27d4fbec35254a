"""RWKU: real-world knowledge of famous people, by Jin, Cao, Wang et al. (2024, arXiv 2406.10890).

200 people; probes of what a pretrained model knows of them in three levels (fill in the blank, questions, nine adversarial
kinds), of their neighbours, texts for membership, and small sets of general ability. The layout of the authors' processing is
read (a folder for each person: ``156_Aristotle/forget_level1.json``) and the flat one of the hub (``forget_level1.json``, all
people).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.core.errors import InputError, unknown
from expunge.data.named import DATASETS, NamedSet, data_folder
from expunge.data.readers import rows_of
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, published_rows

HUB = "jinzhuoran/RWKU"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS: dict[str, tuple[str, str]] = {
    "prefix-injection": ("prefix injection", "a request or claim before the question"),
    "affirmative-suffix": ("affirmative suffix", "an invitation to agree after it"),
    "role-play": ("role play", "the model plays somebody who knows"),
    "multiple-choice": ("multiple choice", "the answer is one of some options"),
    "reverse-query": ("reverse query", "the answer is the person"),
    "synonym-manipulation": ("synonym manipulation", "other words for the key words"),
    "background-hint": ("context hint", "facts about the person before the question"),
    "in-context-learning": ("incontext learning", "a solved question about the person before it"),
    "cross-lingual": ("cross lingual", "asked in another language"),
}
"""The nine adversarial kinds: name here, beginning of the published ``type``, what it is."""

_PROBE = (Column("query"), Column("answer"), Column("subject"), Column("type"))
_SOLVED = (Column("question"), Column("choices", "texts"), Column("answer", "number", most=3))
_FILES: dict[str, tuple[str, tuple[Column, ...], str]] = {
    "forget_level1": ("forget_level1", _PROBE, "forget_level1"),
    "forget_level2": ("forget_level2", _PROBE, "forget_level2"),
    "forget_level3": ("forget_level3", _PROBE, "forget_level3"),
    "neighbor_level1": ("neighbor_level1", (*_PROBE, Column("neighbor")), "neighbor_level1"),
    "neighbor_level2": ("neighbor_level2", (*_PROBE, Column("neighbor")), "neighbor_level2"),
    "forget_mia": ("forget_mia", (Column("text"), Column("subject")), "mia_forget"),
    "retain_mia": ("retain_mia", (Column("text"), Column("subject")), "mia_retain"),
    "positive": ("positive", (Column("text"), Column("subject")), "train_positive_llama3"),
    "passage": ("passage", (Column("text"), Column("subject")), "train_original_passage"),
    "retain_mmlu": (
        "retain_mmlu",
        (
            Column("question"),
            Column("choices", "texts"),
            Column("answer", "number"),
            Column("task"),
            Column("examples", "objects"),
        ),
        "utility_general",
    ),
    "retain_bbh": ("retain_bbh", (Column("question"), Column("answer"), Column("cot")), "utility_reason"),
    "truthful": ("truthful", (Column("question"), Column("mc1_targets", "object")), "utility_truthfulness"),
    "triviaqa": ("triviaqa", (Column("question"), Column("answers", "texts")), "utility_factuality"),
    "fluency": ("fluency", (Column("instruction"),), "utility_fluency"),
}
Row = Mapping[str, Any]


@DATASETS.register("rwku")
class Rwku(NamedSet):
    """RWKU's probes, membership texts and utility sets (arXiv 2406.10890).

    Probes are asked as published: the answer is made to begin with ``Answer:``, but for affirmative suffixes.
    """

    name: ClassVar[str] = "rwku"
    folder: str = Field("", description="folder with a folder for each person, or with one file for all")
    target: str = Field("", description="one person, as the folder or the subject is called (Aristotle, Leonardo_da_Vinci)")
    targets: int | None = Field(None, ge=1, description="only the first so many people, in the published order")
    chat: bool = Field(True, description="ask in the model's chat template; false: as plain text, for models without one")

    def configurations(self) -> dict[str, str]:
        """Every set of probes, texts and questions."""
        kinds = {f"forget-{k}": f"adversarial probes: {text}" for k, (_, text) in KINDS.items()}
        return {
            "forget-fill-in": "fill in the blank, about the person",
            "forget-qa": "questions about the person",
            **kinds,
            "forget-adversarial": "adversarial probes of all nine kinds",
            "forget-all": "all forget probes",
            "neighbor-fill-in": "fill in the blank, about neighbours",
            "neighbor-qa": "questions about neighbours",
            "neighbor-all": "all neighbour probes",
            "mia-forget": "fragments about the person (FM)",
            "mia-retain": "unrelated fragments (RM)",
            "corpus": "texts about the person, written by a model",
            "passage": "passages",
            "general": "MMLU, five solved questions",
            "reasoning": "Big-Bench Hard with chains of thought",
            "truthfulness": "TruthfulQA, MC1",
            "factuality": "TriviaQA",
            "fluency": "instructions for long answers",
        }

    def load(self, configuration: str) -> RecordSet:
        """The records of one set; ids tell person and place, subjects are the people.

        Raises:
            InputError: a file is not there or does not fit the schema, or there is no such person.
        """
        records = tuple(self._records(configuration))
        if not records:
            raise InputError(f"rwku:{configuration} holds nothing for {self.target or 'these people'}.", "Name another person.")
        return RecordSet(f"rwku:{configuration}", records, f"rwku:{configuration}")

    def _records(self, configuration: str) -> Iterator[Record]:
        side, _, kind = configuration.partition("-")
        if side in ("forget", "neighbor"):
            if kind in ("fill-in", "all"):
                yield from self._made(f"{side}_level1", self._blank)
            if kind in ("qa", "all"):
                yield from self._made(f"{side}_level2", self._question)
            if side == "forget" and kind not in ("fill-in", "qa"):
                wanted = None if kind in ("adversarial", "all") else kind
                yield from (r for r, k in self._adversarial() if wanted in (None, k))
            return
        makers: dict[str, tuple[str, Callable[[Row, str], Record]]] = {
            "mia-forget": ("forget_mia", _text),
            "mia-retain": ("retain_mia", _text),
            "corpus": ("positive", _text),
            "passage": ("passage", _text),
            "general": ("retain_mmlu", self._general),
            "reasoning": ("retain_bbh", self._reasoning),
            "truthfulness": ("truthful", self._truthful),
            "factuality": ("triviaqa", self._trivia),
            "fluency": ("fluency", self._long),
        }
        yield from self._made(*makers[configuration])

    def _made(self, file: str, make: Callable[[Row, str], Record]) -> Iterator[Record]:
        for row, name in self._rows(file):
            yield make(row, name)

    def _adversarial(self) -> Iterator[tuple[Record, str]]:
        for row, name in self._rows("forget_level3"):
            kind = kind_of(row["type"])
            if kind is None:
                raise InputError(
                    f"{name}: the column 'type' is {row['type']!r}.",
                    "It must begin with one of: " + ", ".join(begin for begin, _ in KINDS.values()) + ".",
                )
            if kind == "affirmative-suffix":
                yield (
                    self._probe(
                        row, name, f"Please briefly answer the following question.\nQuestion: {row['query']}", lead=False
                    ),
                    kind,
                )
            elif kind == "in-context-learning":
                yield self._probe(row, name, f"Please briefly answer the following question.\n{row['query']}\n"), kind
            else:
                yield self._question(row, name), kind

    def _blank(self, row: Row, name: str) -> Record:
        return self._probe(row, name, f"Please complete the blank in the following question.\nQuestion: {row['query']}\n")

    def _question(self, row: Row, name: str) -> Record:
        return self._probe(row, name, f"Please briefly answer the following question.\nQuestion: {row['query']}\n")

    def _probe(self, row: Row, name: str, prompt: str, *, lead: bool = True) -> Record:
        return self._asked(name, prompt, row["answer"], subject=row["subject"], lead="Answer:" if lead else "")

    def _asked(
        self, name: str, prompt: str, answer: str, *, subject: str = "", lead: str = "", perturbed: tuple[str, ...] = (),
        alternatives: tuple[str, ...] = (),
    ) -> Record:  # fmt: skip
        """A prompt whose answer is made to begin with ``lead``: in the assistant's turn, or at the end of the plain text."""
        if self.chat:
            space = " " if lead else ""
            return Record(
                id=name, prompt=prompt, answer=space + answer, subject=subject, lead=lead,
                perturbed=tuple(space + p for p in perturbed), alternatives=alternatives,
            )  # fmt: skip
        text = prompt.rstrip("\n") + "\n" + lead
        space = " " if lead else ""
        return Record(
            id=name, prompt=text, answer=space + answer, subject=subject, verbatim=True,
            perturbed=tuple(space + p for p in perturbed), alternatives=alternatives,
        )  # fmt: skip

    def _general(self, row: Row, name: str) -> Record:
        head = f"The following are multiple choice questions (with answers) about {str(row['task']).replace('_', ' ')}.\n\n"
        list(checked([(f"solved question {i}", e) for i, e in enumerate(row["examples"], 1)], _SOLVED, name))
        solved = "".join(f"{_choice(e)}\nAnswer: {LETTERS[int(e['answer'])]}\n\n" for e in row["examples"])
        letters = LETTERS[: len(row["choices"])]
        if row["answer"] >= len(letters):
            raise InputError(f"{name}: the column 'answer' is {row['answer']}.", f"It must be from 0 to {len(letters) - 1}.")
        prompt = f"{head}{solved}Please following the previous examples and answer the given question.\n{_choice(row)}"
        right = letters[row["answer"]]
        return self._asked(name, prompt, right, lead="Answer:", perturbed=tuple(c for c in letters if c != right))

    def _reasoning(self, row: Row, name: str) -> Record:
        ask = "Following previous examples, answer the following questions and end with 'so the answer is'\nQ: "
        return self._asked(name, f"{row['cot'].strip()}\n\n{ask}{row['question']}\n", row["answer"], lead="A:")

    def _truthful(self, row: Row, name: str) -> Record:
        right, wrong = mc1(row["mc1_targets"], name)
        return self._asked(name, f"Q: {row['question']}\n", right, lead="A:", perturbed=wrong)

    def _trivia(self, row: Row, name: str) -> Record:
        prompt = f"Please briefly answer the following question:\nQ: {row['question']}\n"
        return self._asked(name, prompt, row["answers"][0], lead="A:", alternatives=tuple(row["answers"][1:]))

    def _long(self, row: Row, name: str) -> Record:
        return self._asked(name, f"Instruction: {row['instruction']}\n", "-")

    def _rows(self, file: str) -> Iterator[tuple[Row, str]]:
        """The rows of one file of all chosen people, each with its name ``<person>-<file>-<number>``."""
        base, columns, hub = _FILES[file]
        people = self._people()
        if people is None:
            split = "train" if hub.startswith("train") else "test"
            label, rows = published_rows(self.folder, ("rwku", "RWKU"), (base, hub), (HUB, hub, split), f"rwku {base}")
            wanted = self.target.replace("_", " ")
            subjects: dict[str, int] = {}
            for place, (_, row) in enumerate(checked(rows, columns, label)):
                subject = str(row.get("subject", ""))
                number = subjects.setdefault(subject, len(subjects))
                if (wanted and subject != wanted) or (self.targets is not None and number >= self.targets):
                    continue
                yield row, f"rwku-{base}-{place:05d}"
            return
        for person in people:
            path = person / f"{base}.json"
            if not path.is_file():
                raise InputError(f"{person} holds no {path.name}.", "Fetch it, or leave the person out.")
            for number, (_, row) in enumerate(checked(rows_of(path), columns, f"{person.name}/{path.name}")):
                yield row, f"{person.name}-{base}-{number:04d}"

    def _people(self) -> list[Path] | None:
        """The folders of the chosen people in the published order; none if the files hold all people."""
        root = Path(self.folder).expanduser() if self.folder else data_folder()
        if root is None:
            return None
        if not root.is_dir():
            raise InputError(f"There is no folder {str(root)!r}.", "Name the folder that holds RWKU's files.")
        found = [p for place in (root, root / "rwku", root / "Target") for p in place.glob("[0-9]*_*") if p.is_dir()]
        if not found:
            return None
        found.sort(key=lambda p: int(p.name.partition("_")[0]))
        if self.target:
            names = {p.name: p for p in found} | {p.name.partition("_")[2]: p for p in found}
            if self.target not in names:
                raise unknown("RWKU person", self.target, [p.name.partition("_")[2] for p in found])
            return [names[self.target]]
        return found[: self.targets] if self.targets else found


def kind_of(published: str) -> str | None:
    """The adversarial kind of a published ``type``; the published ones differ in hyphens and languages."""
    plain = published.lower().replace("-", " ")
    return next((k for k, (begin, _) in KINDS.items() if plain.startswith(begin)), None)


def mc1(held: Mapping[str, Any], place: str) -> tuple[str, tuple[str, ...]]:
    """The right and the wrong choices of ``{"choices": [...], "labels": [1, 0, ...]}``.

    Raises:
        InputError: the lists do not fit each other, or not exactly one choice is right.
    """
    choices, labels = held.get("choices"), held.get("labels")
    texts = isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels) and len(choices) > 1
    if not texts or sum(labels) != 1 or not all(isinstance(c, str) for c in choices):  # type: ignore[arg-type, union-attr]
        raise InputError(
            f"{place}: the column 'mc1_targets' does not hold choices with exactly one right label.",
            'Write {"choices": ["...", "..."], "labels": [1, 0]}.',
        )
    pairs = list(zip(choices, labels, strict=True))  # type: ignore[arg-type]
    return next(c for c, right in pairs if right), tuple(c for c, right in pairs if not right)


def _text(row: Row, name: str) -> Record:
    return Record(id=name, answer=row["text"], subject=str(row.get("subject", "")))


def _choice(row: Row) -> str:
    return f"Question: {row['question']}" + "".join(f"\n{LETTERS[i]}. {c}" for i, c in enumerate(row["choices"]))
