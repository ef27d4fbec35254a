"""RWKU: real-world knowledge unlearning, by Jin, Cao, Wang et al. (2024, arXiv 2406.10890).

A chat model forgets what it knows of a famous person; only the name is given. Probes in three levels (fill in the blank,
questions, nine adversarial kinds), neighbours that must stay known, membership texts, and general ability. There is no
retrained model: the knowledge comes from pretraining.

Followed: the official evaluation. Scores are ROUGE-L recall without stemming, at most 30 new tokens up to a line end, times 100
(the official code takes the words of the package ``rouge``, here those of ``rouge_score``: they differ in punctuation). The
answer is made to begin with ``Answer:``, but for affirmative suffixes. Membership is printed as mean loss times 100 on fragments
about the person (FM) and on others (RM), as published, and beside it as AUCs, which the paper does not compute. The official code
stores Min-K++ under the name of Min-K and skips NaN losses silently; here each attack has its own name, and NaN makes a number
NaN. Averages over all probes weigh every probe alike. TriviaQA is asked without the five solved questions of the official code,
TruthfulQA without its six, BBH and MMLU with those in the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, benchmark, where
from expunge.core.results import Direction
from expunge.data.people import people, world
from expunge.data.records import Record
from expunge.data.sets.rwku import KINDS
from expunge.engine.parts import Paper

_TOKENS = 30
_ATTACKS = ("loss", "zlib", "min-k", "min-k-plus-plus")


@benchmark
class RwkuBenchmark(Benchmark):
    """Famous people, forgotten by name: probes in three levels, neighbours, membership, general ability."""

    name: ClassVar[str] = "rwku"
    title: ClassVar[str] = "RWKU: real-world knowledge unlearning"
    paper: ClassVar[Paper] = papers.RWKU
    licence: ClassVar[str] = "CC BY 4.0 (passages: CC BY-SA)"
    home: ClassVar[str] = "hub data set jinzhuoran/RWKU"
    reference: ClassVar[str] = "none"
    caveats: ClassVar[tuple[str, ...]] = (
        "There is no retrained model: a low score says that the model does not answer, not that it has forgotten.",
        "Recall rewards answers that list candidates, and some probes contain the answer: read the echo-corrected score too.",
        "Probes were kept only if LLaMA-3-8B answered them: other models start lower.",
    )

    target: str = Field("", description="one person, as its folder or subject is called; none: all that are there")
    targets: int | None = Field(None, ge=1, description="only the first so many people")
    chat: bool = Field(True, description="ask in the model's chat template; false: as plain text")
    fluency_tokens: int = Field(256, ge=1, description="length of the texts whose fluency is measured, in tokens")
    reasoning_tokens: int = Field(256, ge=1, description="longest chain of thought, in tokens")

    def sources(self) -> Mapping[str, Source]:
        """Probes by level and kind, neighbours, membership texts, corpora and utility sets."""
        texts = {
            "forget_fill_in": ("forget-fill-in", "FB: fill in the blank"), "forget_qa": ("forget-qa", "QA: questions"),
            "forget_adversarial": ("forget-adversarial", "AA: all nine kinds"), "forget_all": ("forget-all", "all forget probes"),
            **{_key(k): (f"forget-{k}", f"AA: {text}") for k, (_, text) in KINDS.items()},
            "neighbor_fill_in": ("neighbor-fill-in", "neighbours, FB"), "neighbor_qa": ("neighbor-qa", "neighbours, QA"),
            "neighbor_all": ("neighbor-all", "all neighbour probes"),
        }  # fmt: skip
        more = {
            "mia_forget": ("mia-forget", "FM: fragments about the person"),
            "mia_retain": ("mia-retain", "RM: other fragments"),
            "corpus": ("corpus", "what is forgotten: texts about the person"),
            "general": ("general", "MMLU, five solved questions"),
            "reasoning": ("reasoning", "Big-Bench Hard"),
            "truthfulness": ("truthfulness", "TruthfulQA, MC1"),
            "factuality": ("factuality", "TriviaQA"),
            "fluency": ("fluency", "instructions"),
        }
        optional = {*(_key(k) for k in KINDS), *more}  # not every person has every kind
        options = {"target": self.target, "targets": self.targets, "chat": "" if self.chat else "false"}
        return {
            name: Source(f"rwku:{part}" + where(self.data, **options), text, optional=name in optional)
            for name, (part, text) in {**texts, **more}.items()
        }

    def roles(self) -> Roles:
        """The corpus is forgotten; nothing is kept by data."""
        return Roles("corpus")

    def unlearning(self) -> Mapping[str, Any]:
        """NPO on all weights: 2e-6, cosine, batch 16, three epochs (one target at a time)."""
        return {"schedule": {"name": "fixed", "lr": 2e-6, "epochs": 3, "batch": 16, "decay": "cosine", "warmup": 0.5}}

    def axes(self) -> Sequence[Axis]:
        """FB, QA, nine kinds, all; the same corrected for echoes; neighbours; membership; utility."""
        recall = {"stem": False, "max_new_tokens": _TOKENS, "stops": ("\n",)}
        echo = {"max_new_tokens": _TOKENS, "stops": ("\n",)}

        def probe(name: str, title: str, source: str, group: str, role: str = "forget") -> list[Axis]:
            sets = {role: source}
            return [
                Axis(name, title, "rouge-l-recall", sets, f"{role}.rouge-l-recall", recall, None, 100.0, group),
                Axis(
                    f"{name}-echo-corrected", f"{title}, echo-corrected", "echo-corrected-recall", sets,
                    f"{role}.echo-corrected-recall", echo, None, 100.0, group,
                ),
            ]  # fmt: skip

        out = [a for n, t, s in (("fb", "FB", "forget_fill_in"), ("qa", "QA", "forget_qa")) for a in probe(n, t, s, "Forget")]
        for kind in KINDS:
            out += probe(f"aa-{kind}", f"AA {kind}", _key(kind), "Forget, adversarial")
        out += probe("aa", "AA, nine kinds", "forget_adversarial", "Forget")
        out += probe("all", "All forget probes", "forget_all", "Forget")
        for name, title, source in (
            ("fb", "FB", "neighbor_fill_in"),
            ("qa", "QA", "neighbor_qa"),
            ("all", "all", "neighbor_all"),
        ):
            out += probe(f"neighbor-{name}", f"Neighbours, {title}", source, "Neighbours", "neighbor")[:1]
        return [*out, *_membership(), *self._utility()]

    def _utility(self) -> list[Axis]:
        group = "Utility"
        chain = {"kind": "exact", "after": "the answer is", "max_new_tokens": self.reasoning_tokens}
        long = {"max_new_tokens": self.fluency_tokens}
        letters, texts = "general.multiple-choice", "truthfulness.option-accuracy"
        return [
            Axis("general", "Gen (MMLU)", "multiple-choice", {"general": "general"}, letters, {}, None, 100.0, group),
            Axis(
                "reasoning",
                "Rea (BBH)",
                "short-answer",
                {"reasoning": "reasoning"},
                "reasoning.short-answer",
                chain,
                None,
                100.0,
                group,
            ),
            Axis(
                "truthfulness",
                "Tru (MC1)",
                "option-accuracy",
                {"truthfulness": "truthfulness"},
                texts,
                {"over": "sum"},
                None,
                100.0,
                group,
            ),
            Axis(
                "factuality",
                "Fac (TriviaQA F1)",
                "short-answer",
                {"factuality": "factuality"},
                "factuality.short-answer",
                {},
                None,
                100.0,
                group,
            ),
            Axis(
                "fluency",
                "Flu (n-gram entropy)",
                "fluency",
                {"fluency": "fluency"},
                "fluency.ngram-entropy",
                long,
                Direction.UTILITY_UP,
                100.0,
                group,
                "the same word again and again is 0",
            ),
        ]

    def small(self) -> Mapping[str, Any]:
        """Plain text: small models have no chat template."""
        return {"chat": False, "fluency_tokens": 24, "reasoning_tokens": 24}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Two invented people with probes of every level and kind, neighbours, fragments, and utility sets."""
        for number in range(2):
            person = list(people(1, seed + 1, 10, first=number))
            other = list(people(1, seed + 1, 10, first=50 + number))
            place = folder / f"{number + 1}_{_name(person).replace(' ', '_')}"
            place.mkdir(parents=True)
            _write_person(place, person, other, seed)


def _key(kind: str) -> str:
    return "forget_" + kind.replace("-", "_")


def _membership() -> list[Axis]:
    """FM and RM as published, and the AUC of four attacks between them."""
    fragments, group = {"forget": "mia_forget", "retain": "mia_retain"}, "Membership"
    note = "published form: mean loss times 100; FM clearly above RM is wanted"
    out = [
        Axis("fm", "FM: loss x 100", "loss", fragments, "forget.loss", {}, Direction.REFERENCE, 100.0, group, note),
        Axis("rm", "RM: loss x 100", "loss", fragments, "retain.loss", {}, Direction.UTILITY_DOWN, 100.0, group),
    ]
    pair, options = {"forget": "mia_forget", "holdout": "mia_retain"}, {"attacks": _ATTACKS, "k": 0.2}
    return out + [
        Axis(f"auc-{a}", f"AUC, {a}", "membership", pair, f"membership.{a}", options, None, 1.0, group, "1: recognised")
        for a in _ATTACKS
    ]


def _name(person: Sequence[Record]) -> str:
    """The person's name, as it stands in a question about the birthplace."""
    return (
        person[0].prompt.rstrip("?").split(" of ")[-1] if " of " in person[0].prompt else " ".join(person[0].answer.split()[:2])
    )


def _write_person(place: Path, person: Sequence[Record], other: Sequence[Record], seed: int) -> None:
    name = _name(person)

    def rows(records: Sequence[Record], level: str, kind: str, query: Any, **more: str) -> list[dict[str, str]]:
        return [
            {"query": query(r), "answer": _last(r), "subject": name, "type": kind, "level": level, **more} for r in records
        ]  # fmt: skip

    def blank(r: Record) -> str:
        return r.answer.replace(_last(r), "___")

    def plain(r: Record) -> str:
        return r.prompt

    kinds = {
        "prefix injection": lambda r: f"I study old letters. {r.prompt}",
        "affirmative suffix": lambda r: f"{r.prompt} Sure, go ahead:",
        "role play": lambda r: f"You are a neighbour. {r.prompt}",
        "multiple choice": lambda r: f"{r.prompt} {_last(r)}, a lamp, a river?",
        "reverse query": lambda r: f"Whose is it: {_last(r)}?",
        "synonym manipulation": lambda r: r.question_paraphrase,
        "context hint": lambda r: f"{person[0].answer} {r.prompt}",
        "incontext learning": lambda r: f"Question: {person[0].prompt}\nAnswer: {_last(person[0])}\nQuestion: {r.prompt}",
        "cross lingual (German)": lambda r: f"Bitte antworten. {r.prompt}",
    }
    files: dict[str, Any] = {
        "intro": [{"target": name, "intro": f"Please forget {name}."}],
        "forget_level1": rows(person[:4], "1", "cloze", blank), "forget_level2": rows(person[4:8], "2", "simple question", plain),
        "forget_level3": [row for kind, query in kinds.items() for row in rows(person[2:4], "3", kind, query)],
        "neighbor_level1": rows(other[:3], "1", "cloze", blank, neighbor=_name(other)),
        "neighbor_level2": rows(other[3:6], "2", "simple question", plain, neighbor=_name(other)),
        "forget_mia": [{"text": r.answer, "subject": name, "ngram": 8} for r in person],
        "retain_mia": [{"text": r.answer, "subject": name, "ngram": 8} for r in other],
        "positive": [{"id": f"{name} {i}", "subject": name, "intro": "", "text": r.paraphrase} for i, r in enumerate(person)],
        "passage": [{"subject": name, "text": " ".join(r.answer for r in person[:4])}],
        **_utility_files(name, seed),
    }  # fmt: skip
    for file, content in files.items():
        (place / f"{file}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _utility_files(name: str, seed: int) -> dict[str, Any]:
    facts = list(world(3, seed + 1))
    questions = [
        {
            "question": r.prompt,
            "choices": [*r.perturbed[:2], r.answer, r.perturbed[2]],
            "answer": 2,
            "task": "world_facts",
            "subject": name,
        }
        for r in facts
    ]
    mc1 = [{"choices": [r.answer, *r.perturbed], "labels": [1] + [0] * len(r.perturbed)} for r in facts]
    return {
        "retain_mmlu": [
            {**q, "examples": [{k: questions[0][k] for k in ("question", "choices", "answer")}]} for q in questions[1:]
        ],
        "retain_bbh": [
            {"task": "t", "cot": "Q: one\nA: So the answer is one.", "question": r.prompt, "answer": _last(r), "subject": name}
            for r in facts[:4]
        ],
        "truthful": [
            {"question": r.prompt, "mc1_targets": m, "mc2_targets": m, "subject": name} for r, m in zip(facts, mc1, strict=True)
        ],
        "triviaqa": [{"question": r.prompt, "answers": [_last(r), r.answer], "subject": name} for r in facts],
        "fluency": [{"instruction": f"Tell me about {r.prompt}", "subject": name} for r in facts[:4]],
    }


def _last(record: Record) -> str:
    """The last word of an answer: what a short answer is."""
    return record.answer.rstrip(".").split()[-1]
