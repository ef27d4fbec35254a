"""Multiple choice: WMDP (hazardous knowledge, arXiv 2403.03218), MMLU (arXiv 2009.03300), TruthfulQA (arXiv 2109.07958).

Every question is asked twice: with its options listed and answered by a letter, as published (the letters' scores come from one
forward pass), and by the full texts of the options, which does not depend on whether the model still answers with letters.

There is no retrained model for what comes from pretraining. On WMDP the best that can be seen is the level of a guess, and that
is weak evidence: a model below it avoids the right letter and so still knows it, and a model that answers with noise on such
topics has lost the format, not the knowledge. The corpora are read only when asked for (``hazardous=true``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, benchmark, where
from expunge.data.people import people, world
from expunge.data.records import Record
from expunge.engine.parts import Paper

_AREAS = {"bio": ("biology", 1273), "cyber": ("cybersecurity", 1987), "chem": ("chemistry", 408)}
_LETTERS = "ABCD"


def choice_axes(key: str, title: str, role: str, sources: tuple[str, str], group: str = "") -> list[Axis]:
    """The two axes of a set of questions: by letters and by full texts."""
    letters, texts = sources
    number = f"{role}.multiple-choice"
    return [
        Axis(f"{key}-letters", f"{title}, letters", "multiple-choice", {role: letters}, number, group=group),
        Axis(
            f"{key}-texts", f"{title}, full texts", "option-accuracy", {role: texts}, f"{role}.option-accuracy", {"over": "mean"},
            group=group, note="by mean log-probability of the options' texts, without the options in the prompt",
        ),
    ]  # fmt: skip


@benchmark
class WmdpBenchmark(Benchmark):
    """Hazardous knowledge in four-way questions on biology, cybersecurity and chemistry; MMLU beside it for what must stay."""

    name: ClassVar[str] = "wmdp"
    title: ClassVar[str] = "WMDP: hazardous knowledge, multiple choice"
    paper: ClassVar[Paper] = papers.WMDP
    licence: ClassVar[str] = "questions: MIT; corpora: on agreement with their authors, never shown"
    home: ClassVar[str] = "hub data sets cais/wmdp and cais/wmdp-corpora"
    reference: ClassVar[str] = "none"
    caveats: ClassVar[tuple[str, ...]] = (
        "Below chance is no proof of forgetting: whoever avoids the right option tells it from the others.",
        "Accuracy by letters falls with damage to the format alone: read the full texts, MMLU and fluency beside it.",
    )

    hazardous: bool = Field(False, description="also read the corpora for unlearning (bio and cyber); they are never shown")
    each: int | None = Field(None, ge=1, description="MMLU: only the first so many questions of every subject")
    shots: int = Field(0, ge=0, le=5, description="MMLU: solved questions before each; published: 0 and 5")

    def sources(self) -> Mapping[str, Source]:
        """Questions in both forms, MMLU, and on request the corpora."""
        out: dict[str, Source] = {}
        for area, (text, rows) in _AREAS.items():
            for form in ("letters", "texts"):
                reference = f"wmdp:{area}" + where(self.data, form="" if form == "letters" else form)
                out[f"{area}_{form}"] = Source(reference, f"questions on {text}, {form}", rows, optional=area == "chem")
        for form in ("letters", "texts"):
            options = {"form": "" if form == "letters" else form, "shots": self.shots, "each": self.each}
            out[f"mmlu_{form}"] = Source("mmlu:test" + where(self.data, **options), f"MMLU, {form}", optional=True)
        if self.hazardous:
            for area in ("bio", "cyber"):
                for side in ("forget", "retain"):
                    reference = f"wmdp:{area}-{side}-corpus" + where(self.data, hazardous="true")
                    out[f"{area}_{side}"] = Source(reference, f"{side} corpus, {area}", hazardous=True, optional=area == "cyber")
        return out

    def learnt(self) -> Sequence[str]:
        """The questions once, by letters, and the corpora if they may be read."""
        return tuple(n for n in self.sources() if not n.endswith("_texts"))

    def roles(self) -> Roles | None:
        """The biology corpora, if they may be read."""
        return Roles("bio_forget", "bio_retain") if self.hazardous else None

    def axes(self) -> Sequence[Axis]:
        """Each area by letters and by texts, and MMLU."""
        out = [
            a
            for area, (text, _) in _AREAS.items()
            for a in choice_axes(area, f"WMDP {text}", "forget", (f"{area}_letters", f"{area}_texts"), "Hazardous knowledge")
        ]
        return out + choice_axes("mmlu", "MMLU", "mmlu", ("mmlu_letters", "mmlu_texts"), "General knowledge")

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Harmless questions of the schema, harmless corpora, and two subjects of MMLU."""
        folder.mkdir(parents=True)
        for number, area in enumerate(_AREAS):
            _dump(folder / f"wmdp-{area}.json", [_question(r, i) for i, r in enumerate(_facts(seed, 4 * number))])
        for area in ("bio", "cyber"):
            for side, first in (("forget", 0), ("retain", 6)):
                texts = [" ".join(r.answer for r in people(1, seed + 1, 8, first=first + i)) for i in range(6)]
                lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
                (folder / f"{area}-{side}-corpus.jsonl").write_text(lines, encoding="utf-8")
        write_mmlu(folder / "mmlu", seed)


@benchmark
class MmluBenchmark(Benchmark):
    """57 subjects of four-way questions: general knowledge, which unlearning must leave alone."""

    name: ClassVar[str] = "mmlu"
    title: ClassVar[str] = "MMLU: general knowledge, multiple choice"
    paper: ClassVar[Paper] = papers.MMLU
    licence: ClassVar[str] = "MIT"
    home: ClassVar[str] = "the folders dev/ and test/ of hendrycks/test"
    reference: ClassVar[str] = "none"
    caveats: ClassVar[tuple[str, ...]] = ("The number of solved questions changes the accuracy by several points: say which.",)

    subject: str = Field("", description="one subject, such as virology; none: all 57")
    each: int | None = Field(None, ge=1, description="only the first so many questions of every subject")
    shots: int = Field(5, ge=0, le=5, description="solved questions before each question")

    def sources(self) -> Mapping[str, Source]:
        """The questions in both forms."""
        out = {}
        rows = None if self.subject or self.each else 14042
        for form in ("letters", "texts"):
            options = {"form": "" if form == "letters" else form, "shots": self.shots, "each": self.each, "subject": self.subject}
            out[form] = Source("mmlu:test" + where(self.data, **options), f"questions, {form}", rows)
        return out

    def learnt(self) -> Sequence[str]:
        """The questions once, by letters."""
        return ("letters",)

    def axes(self) -> Sequence[Axis]:
        """By letters and by texts."""
        return choice_axes("mmlu", "MMLU", "mmlu", ("letters", "texts"))

    def small(self) -> Mapping[str, Any]:
        """One solved question."""
        return {"shots": 1}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Two subjects."""
        write_mmlu(folder, seed)


@benchmark
class TruthfulQaBenchmark(Benchmark):
    """Questions that invite misconceptions: whether the one true answer is the likeliest (MC1)."""

    name: ClassVar[str] = "truthfulqa"
    title: ClassVar[str] = "TruthfulQA, MC1"
    paper: ClassVar[Paper] = papers.TRUTHFUL
    licence: ClassVar[str] = "Apache-2.0"
    home: ClassVar[str] = "TruthfulQA.csv of sylinrl/TruthfulQA, or hub data set truthfulqa/truthful_qa"
    reference: ClassVar[str] = "none"
    caveats: ClassVar[tuple[str, ...]] = (
        "From the CSV, MC1 is the best answer against all incorrect ones: the published choices are a selection of these.",
    )

    shots: int = Field(6, ge=0, le=6, description="of the six published solved questions")

    def sources(self) -> Mapping[str, Source]:
        """The questions."""
        return {"mc1": Source("truthfulqa:mc1" + where(self.data, shots=self.shots), "questions, one right answer each", 817)}

    def axes(self) -> Sequence[Axis]:
        """By the log-probability of whole answers, as published, and per token."""
        return [
            Axis("mc1", "MC1 (sum)", "option-accuracy", {"truthful": "mc1"}, "truthful.option-accuracy", {"over": "sum"}),
            Axis(
                "mc1-mean", "MC1 per token", "option-accuracy", {"truthful": "mc1"}, "truthful.option-accuracy", {"over": "mean"}
            ),
        ]

    def small(self) -> Mapping[str, Any]:
        """One solved question."""
        return {"shots": 1}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Invented facts in the columns of the CSV."""
        folder.mkdir(parents=True)
        with (folder / "TruthfulQA.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"])
            for r in _facts(seed, 0):
                writer.writerow(["Adversarial", "World", r.prompt, r.answer, r.paraphrase, "; ".join(r.perturbed), ""])


def _facts(seed: int, first: int) -> list[Record]:
    return list(world(6, seed + 1))[first : first + 12]


def _question(record: Record, number: int) -> dict[str, Any]:
    """A fact as a question of four options; the right one moves from A to D and on."""
    at = number % 4
    wrong = list(record.perturbed[:3])
    return {"question": record.prompt, "choices": [*wrong[:at], record.answer, *wrong[at:]], "answer": at}


def write_mmlu(folder: Path, seed: int) -> None:
    """Two subjects, one in each layout of the CSV files."""
    for place, start in (("dev", 0), ("test", 5)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for number, subject in enumerate(("geography", "history_of_towns")):
            rows = [
                _question(r, i)
                for i, r in enumerate(list(world(8, seed + 1 + number))[start : start + 5 + 5 * (place == "test")])
            ]
            with (folder / place / f"{subject}_{place}.csv").open("w", encoding="utf-8", newline="") as handle:
                writer = csv.writer(handle)
                if number == 0:
                    writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                for row in rows:
                    writer.writerow([row["question"], *row["choices"], row["answer"] if number == 0 else _LETTERS[row["answer"]]])


def _dump(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
