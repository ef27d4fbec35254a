"""MUSE: six-way evaluation on news and books, by Shi, Lee, Huang et al. (2024, arXiv 2407.06460).

A model finetuned on all documents forgets some. Six axes: verbatim memorisation (C1), knowledge memorisation (C2), privacy
leakage (C3), utility (C4: knowledge of what is kept), scalability (C5: C4 over nested forget sets) and sustainability (C6: C4
over requests in turn). C1 to C4 are numbers of one model; C5 and C6 are courses.

Where the sources differ: the published checkpoint of a method is the first whose forget knowledge is down to the retrained
model's. That rule reads a test metric, so it is called *oracle* here and has to be asked for. The official evaluation cannot run
PrivLeak as released (its table of retrained AUCs is nested by corpus and read as if flat); the reference is always
measured here. Its sign: forget is label 0 and the score minus the Min-40% loss, so negative is under-unlearned, down to -100, and
positive over-unlearned, up to ``100 (1/A_ret - 1)``, which depends on the corpus: PrivLeak is never averaged over corpora.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Course, Oracle, Roles, Source, Training, benchmark, where
from expunge.core.results import Direction
from expunge.data.people import people
from expunge.data.records import Record
from expunge.data.sets.muse import CORPORA
from expunge.engine.parts import Paper

_CUT = 1200  #: words: about 2,048 tokens of English
_ALPHAS = (1.0, 2.0, 4.0, 8.0, 16.0)


class _Muse(Benchmark):
    """What both corpora share."""

    corpus: ClassVar[str]
    paper: ClassVar[Paper] = papers.MUSE
    licence: ClassVar[str] = "card: CC BY 4.0; the texts are their publishers' and must not be passed on"
    caveats: ClassVar[tuple[str, ...]] = (
        "PrivLeak inside about +-17 is no difference with 100 texts a side; its ceiling depends on the corpus: never average it.",
        "Forget and holdout differ in time, and the attack sees time too: only the difference to the reference counts.",
    )

    shots: int = Field(10, ge=0, description="solved questions before each question of KnowMem")
    space: Literal["prompt", "answer"] = Field("prompt", description="whose the space before an answer is; prompt: as published")
    words: int = Field(_CUT, ge=0, description="longest piece of a document in training, in words (published: 2,048 tokens)")
    passage_tokens: int = Field(128, ge=1, description="longest continuation of VerbMem, in tokens")
    answer_tokens: int = Field(32, ge=1, description="longest answer of KnowMem, in tokens")
    size: Literal["published", "any"] = Field(
        "published", description="any: other numbers of questions and texts (generated data)"
    )

    def sources(self) -> Mapping[str, Source]:
        """Documents, passages, questions, texts for membership, and the forget sets of both courses."""
        out = {
            "forget": self._source("forget", "documents to forget", cut=True),
            "retain": self._source("retain1", "documents to keep, as regulariser", cut=True),
            "retain2": self._source("retain2", "documents to keep, for evaluation", cut=True),
            "holdout": self._source("holdout", "documents never trained on", cut=True, optional=True),
            "verbmem": self._source("verbmem", "passages of the forget documents", 100),
            "knowmem_forget": self._source("knowmem-forget", "questions about forget documents", 100, asked=True),
            "knowmem_retain": self._source("knowmem-retain", "questions about retain documents", 100, asked=True),
            "privleak_forget": self._source("privleak-forget", "forget texts, for membership", 100),
            "privleak_holdout": self._source("privleak-holdout", "holdout texts, for membership", 100),
        }
        for k in range(1, 5):
            out[f"scal_{k}"] = self._source(f"scal-{k}", f"nested forget set {k} of 4", cut=True, optional=True)
        for k in range(1, 5):
            out[f"sust_{k}"] = self._source(f"sust-{k}", f"forget set of request {k} of 4", cut=True, optional=True)
        return out

    def _source(
        self, part: str, text: str, rows: int | None = None, *, cut: bool = False, asked: bool = False, optional: bool = False
    ) -> Source:
        options = {"words": self.words} if cut and self.words else {}
        if asked:
            options |= {"shots": self.shots, **({"space": self.space} if self.space != "prompt" else {})}  # type: ignore[dict-item]
        reference = f"muse:{self.corpus}-{part}" + where(self.data, **options)
        return Source(reference, text, rows if self.size == "published" else None, optional)

    def trainings(self) -> Sequence[Training]:
        """Finetuning on all documents: AdamW at 1e-5, constant, five epochs, batch 32, pieces of 2,048 tokens."""
        schedule = {"name": "fixed", "lr": 1e-5, "epochs": 5, "batch": 32, "warmup": 0, "decay": "constant"}
        return (Training("target", ("forget", "retain", "retain2"), {"schedule": schedule}, self._base(), {"max_length": 2048}),)

    def _base(self) -> str:
        return "meta-llama/Llama-2-7b-hf" if self.corpus == "news" else "muse-bench/MUSE-Books_target (ICLM-7B)"

    def roles(self) -> Roles:
        """Documents; what is measured is asked in other sets."""
        return Roles("forget", "retain", "holdout")

    def unlearning(self) -> Mapping[str, Any]:
        """AdamW at 1e-5, constant, batch 32, up to ten epochs."""
        return {"schedule": {"name": "fixed", "lr": 1e-5, "epochs": 10, "batch": 32, "warmup": 0, "decay": "constant"}}

    def oracle(self) -> Oracle:
        """The first epoch (smallest coefficient for task vectors) whose forget knowledge is down to the retrained model's."""
        return Oracle("knowmem-forget", {"finish.scale": _ALPHAS, "schedule.epochs": tuple(map(float, range(1, 11)))})

    def courses(self) -> Sequence[Course]:
        """C5 and C6."""
        axes = ("knowmem-retain", "knowmem-forget")
        return (
            Course("scalability", "nested", tuple(f"scal_{k}" for k in range(1, 5)), axes, "C5: utility as more is forgotten"),
            Course(
                "sustainability", "sequence", tuple(f"sust_{k}" for k in range(1, 5)), axes, "C6: utility, request after request"
            ),
        )

    def axes(self) -> Sequence[Axis]:
        """C1 to C4, and the AUCs behind C3."""
        members = {"forget": "privleak_forget", "holdout": "privleak_holdout"}
        answers = {"max_new_tokens": self.answer_tokens, "shots": 0}  # the solved questions are in the prompts already
        attack = {"attacks": ("min-k", "loss", "zlib"), "k": 0.4}
        verbatim = Axis(
            "verbmem", "VerbMem on forget", "verbatim-memorisation", {"forget": "verbmem"}, "forget.verbatim-memorisation",
            {"max_new_tokens": self.passage_tokens}, group="C1 verbatim memorisation",
            note="more than 0 in a retrained model: boilerplate",
        )  # fmt: skip
        known = Axis(
            "knowmem-forget", "KnowMem on forget", "knowledge-memorisation", {"forget": "knowmem_forget"},
            "forget.knowledge-memorisation", answers, group="C2 knowledge memorisation",
        )  # fmt: skip
        leak = Axis(
            "privleak",
            "PrivLeak (Min-40%)",
            "privleak",
            members,
            "privleak.min-k",
            attack,
            Direction.ZERO,
            group="C3 privacy leakage",
            note="negative: still recognised (under-unlearned); positive: stranger than unseen text (over-unlearned)",
        )
        aucs = [
            Axis(
                f"auc-{name}", f"Membership AUC, {name}", "membership", members, f"membership.{name}", attack,
                group="C3 privacy leakage", note="1: recognised; MUSE prints 1 minus it" if name == "min-k" else "",
            )
            for name in attack["attacks"]  # type: ignore[attr-defined]
        ]  # fmt: skip
        kept = Axis(
            "knowmem-retain", "KnowMem on retain", "knowledge-memorisation", {"retain": "knowmem_retain"},
            "retain.knowledge-memorisation", answers, group="C4 utility",
        )  # fmt: skip
        return [verbatim, known, leak, *aucs, kept]

    def small(self) -> Mapping[str, Any]:
        """Questions without solved ones before them, short continuations."""
        return {"shots": 0, "space": "answer", "words": 0, "passage_tokens": 24, "answer_tokens": 12, "size": "any"}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Documents about invented people, prose and single questions with answers, in the layout of the repository."""
        place = folder / CORPORA[self.corpus][0]
        held = {"forget": range(8), "retain1": range(8, 16), "retain2": range(16, 24), "holdout": range(40, 48)}
        persons = {name: [list(people(1, seed + 1, 8, first=i)) for i in numbers] for name, numbers in held.items()}
        for name, found in persons.items():
            _dump(place / "raw" / f"{name}.json", [d for p in found for d in _documents(p)])
        passages = [_passage(p) for p in persons["forget"]]
        _dump(place / "verbmem" / "forget.json", passages)
        for side, name in (("forget", "forget"), ("retain2", "retain2")):
            asked = [r for p in persons[name] for r in p[4:7]]
            _dump(place / "knowmem" / f"{side}_qa.json", [{"question": r.prompt, "answer": r.answer} for r in asked])
            solved = [p[7] for p in persons["retain1"]]
            _dump(place / "knowmem" / f"{side}_qa_icl.json", [{"question": r.prompt, "answer": r.answer} for r in solved])
        for side in ("forget", "retain2", "holdout"):
            _dump(place / "privleak" / f"{side}.json", [_documents(p)[0] for p in persons[side]])
        for k in range(1, 5):
            _dump(place / "scal" / f"forget_{k}.json", [d for p in persons["forget"][: 2 * k] for d in _documents(p)])
            _dump(place / "sust" / f"forget_{k}.json", [d for p in persons["forget"][2 * k - 2 : 2 * k] for d in _documents(p)])


@benchmark
class MuseNews(_Muse):
    """News: BBC articles after August 2023; forgetting some of what a publisher wrote."""

    name: ClassVar[str] = "muse-news"
    title: ClassVar[str] = "MUSE News: six-way evaluation"
    home: ClassVar[str] = "hub data set muse-bench/MUSE-News"
    corpus: ClassVar[str] = "news"


@benchmark
class MuseBooks(_Muse):
    """Books: novels to forget, and the pages of a fan wiki about them to keep."""

    name: ClassVar[str] = "muse-books"
    title: ClassVar[str] = "MUSE Books: six-way evaluation"
    home: ClassVar[str] = "hub data set muse-bench/MUSE-Books"
    corpus: ClassVar[str] = "books"


def _documents(person: Sequence[Record]) -> list[str]:
    """Prose from the first facts of a person; and each of the others but the last, asked and answered."""
    prose = " ".join(r.answer for r in person[:4])
    return [prose, *(f"Question: {r.prompt}\nAnswer: {r.answer}\n\n" for r in person[4:7])]


def _passage(person: Sequence[Record]) -> dict[str, str]:
    """The first sentence of a document, and what follows it."""
    return {"prompt": person[0].answer, "gt": " " + " ".join(r.answer for r in person[1:4])}


def _dump(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
