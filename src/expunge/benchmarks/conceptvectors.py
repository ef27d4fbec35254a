"""ConceptVectors: intrinsic evaluation by knowledge traces, by Hong, Yu, Yang, Ravfogel and Geva (2024, arXiv 2406.11614).

A chat model is to forget a concept (an article about it is the forget set). Two things are measured. *Parametric*: how far the
one value vector that holds the concept has moved from where it is in the target, and what words it promotes now. *Behaviour*: how
much the answers about the concept, and to unrelated questions, are like the target's; there are no right answers. In between
stands the effect of noise on the vector: in the target it shows that the vector does hold the concept.

Followed: the official evaluation. ROUGE-L F1 and BLEU (third smoothing) against the target's answers, 100 new tokens, greedy,
asked as published, the 200 words that a vector promotes most. Where it differs: words of ROUGE are those of ``rouge_score``, not
of the package ``rouge``; only new tokens are compared (the published code takes the last hundred tokens of padded rows); words
without a meaning of their own come from a list here, there from nltk; a word of the article is a token that stands in the text as
the model cuts it. Validation noise starts from clean weights for each concept; in the published notebook noise piles up over
concepts. Persona, story and article before the question are worded here; the German questions lie in a file that is not part of
the data. Concepts are published one at a time: name one with ``concept``, and the other articles of the file are kept.

Layers and columns are those of the file's own model. In any other model, ``vectors=found`` looks for the vector that the texts to
complete depend on most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, benchmark, where
from expunge.core.results import Direction
from expunge.data.people import people, world
from expunge.data.records import Record
from expunge.engine.parts import Paper

_STYLES = {"persona": "to one who knows it all", "story": "within a story", "article": "after the beginning of the article"}
_CONCEPTS = {("llama2-7b", "dev"): 10, ("olmo-7b", "dev"): 18}  #: of the published files


@benchmark
class ConceptVectorsBenchmark(Benchmark):
    """Concepts with the weights that hold them: has unlearning changed these, or only the answers?"""

    name: ClassVar[str] = "conceptvectors"
    title: ClassVar[str] = "ConceptVectors: knowledge traces in the weights"
    paper: ClassVar[Paper] = papers.CONCEPT_VECTORS
    licence: ClassVar[str] = "CC BY 4.0 (articles: CC BY-SA)"
    home: ClassVar[str] = "the folder ConceptVectors_data/ of yihuaihong/ConceptVectors"
    reference: ClassVar[str] = "none"
    caveats: ClassVar[tuple[str, ...]] = (
        "There is no retrained model and no right answer: answers unlike the target's may say the same in other words.",
        "The vector holds the concept only where noise on it changes the target's answers about the concept more than others.",
        "Words are read through the model's own head: they can change where the vector has not.",
    )

    model: Literal["llama2-7b", "olmo-7b"] = Field("llama2-7b", description="the model whose vectors the file names")
    split: Literal["dev", "test"] = Field("test", description="development or test concepts")
    concept: str = Field("", description="one concept, as published, with _ for spaces; none: all of the file at once")
    vectors: Literal["given", "found"] = Field("given", description="vectors of the file, or those found in the target")
    words: int = Field(200, ge=1, description="words that a vector promotes most")
    noise: float = Field(0.1, gt=0, description="noise that tests a vector; in units of its root mean square if it was found")
    answer_tokens: int = Field(100, ge=1, description="longest answer, in tokens")
    pieces: int | None = Field(None, ge=1, description="only the first so many pieces of each article")

    def sources(self) -> Mapping[str, Source]:
        """Vectors, articles, passages, questions about the concepts in four forms, and unrelated ones."""
        texts = {
            "article": "what is forgotten: the articles, in pieces", "vectors": "layer and column of each concept's vector",
            "qa": "questions about the concepts, without answers", "completion": "passages to complete",
            "unrelated": "questions about other things, without answers",
            **{f"qa_{k}": f"the questions {text}" for k, text in _STYLES.items()},
        }  # fmt: skip
        if self.concept:
            texts["others"] = "what is kept: articles about the other concepts"
        query = where(self.data, model=self.model, split=self.split, concept=self.concept.replace(" ", "_"), pieces=self.pieces)
        rows = None if self.concept else _CONCEPTS.get((self.model, self.split))
        return {
            name: Source(
                f"conceptvectors:{name.replace('_', '-')}{query}", text, rows if name == "vectors" else None,
                optional=name == "others",
            )
            for name, text in texts.items()
        }  # fmt: skip

    def learnt(self) -> Sequence[str]:
        """A model from random weights learns articles, passages and, where the data have answers, the questions."""
        return tuple(n for n in self.sources() if n in ("article", "others", "completion", "qa", "unrelated"))

    def roles(self) -> Roles:
        """The articles are forgotten; with one concept, the others are kept."""
        return Roles("article", "others" if self.concept else None)

    def unlearning(self) -> Mapping[str, Any]:
        """All weights, 5e-5, 10 epochs in steps of 16, one epoch of warm-up; weight decay 0.01."""
        return {"schedule": {"name": "fixed", "lr": 5e-5, "epochs": 10, "batch": 16, "warmup": 1, "weight_decay": 0.01}}

    def axes(self) -> Sequence[Axis]:
        """The vectors, their effect, then answers about the concept, to unrelated questions, and to roundabout ones."""
        out = self._parametric()
        for name, title, group, role in (
            ("qa", "Questions", "Answers about the concept", "forget"),
            ("completion", "Completion", "Answers about the concept", "forget"),
            ("unrelated", "Questions", "Unrelated answers", "unrelated"),
        ):
            for score, called in (("rouge", "ROUGE-L"), ("bleu", "BLEU")):
                options = {"score": score, "max_new_tokens": self.answer_tokens}
                number = f"{role}.answers-as-target"
                out.append(
                    Axis(f"{name}-{score}", f"{title}, {called}", "answers-as-target", {role: name}, number, options, group=group)
                )
        options = {"score": "rouge", "max_new_tokens": self.answer_tokens, "of": "plain"}
        for name, text in _STYLES.items():
            sets = {"forget": f"qa_{name}", "plain": "qa"}
            out.append(
                Axis(
                    f"jailbreak-{name}", f"Asked {text}, ROUGE-L", "answers-as-target", sets, "forget.answers-as-target", options,
                    group="Roundabout questions", note="against the target's answers to the plain questions",
                )
            )  # fmt: skip
        return out

    def _parametric(self) -> list[Axis]:
        sets = {"forget": "vectors", "completion": "completion"}
        options: dict[str, Any] = {"where": self.vectors, "words": self.words}
        number, group, same = "forget.concept-vectors", "Traces in the weights", Direction.FORGET_DOWN
        noise = {
            "where": self.vectors, "noise": self.noise, "relative": self.vectors == "found", "max_new_tokens": self.answer_tokens,
        }  # fmt: skip
        return [
            Axis("cosine", "Cosine to the target's vector", "concept-vectors", sets, number, options, same, group=group),
            Axis(
                "distance", "Distance to it", "concept-vectors", sets, f"{number}.distance", options, Direction.REFERENCE,
                group=group, note="0: the vector has not moved",
            ),
            Axis("overlap", "Words that both promote", "concept-vectors", sets, f"{number}.overlap", options, same, group=group),
            Axis(
                "article-words", "Words of the article, now to then", "concept-vectors", sets, f"{number}.article", options, same,
                group=group, note="the paper's precise Jaccard; may exceed 1",
            ),
            Axis("related", "Its words that are left", "concept-vectors", sets, f"{number}.related", options, same, group=group),
            Axis(
                "effect", "Effect of noise on the vector", "concept-effect", {**sets, "qa": "qa", "unrelated": "unrelated"},
                "forget.concept-effect", noise, group=group,
                note="in the target it validates the vector; near 0, answers about the concept do not come from it",
            ),
        ]  # fmt: skip

    def small(self) -> Mapping[str, Any]:
        """Vectors are looked for: those of the file belong to a model of seven billion weights."""
        return {"vectors": "found", "noise": 25.0, "words": 20, "answer_tokens": 16}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Three invented people as concepts of both models, and questions about invented countries."""
        folder.mkdir(parents=True, exist_ok=True)
        for model in ("llama2-7b", "olmo-7b"):
            rows = [_row(list(people(1, seed + 1, 10, first=i)), seed, i, numbered=model == "olmo-7b") for i in range(3)]
            for split in ("dev", "test"):
                text = json.dumps(rows, ensure_ascii=False, indent=1)
                (folder / f"{model}_concepts_{split}.json").write_text(text, encoding="utf-8")


def _row(person: Sequence[Record], seed: int, number: int, *, numbered: bool) -> dict[str, Any]:
    name = " ".join(person[0].answer.split()[:2])
    facts = list(world(3, seed + 1))
    halves = [r.answer.split() for r in person]
    return {
        **({"ID": number} if numbered else {}),
        "Concept": name, "Layer": number % 2, "Dim": 3 + number,
        "QA": [f" {r.prompt}\n" for r in person], "QA_answers": [r.answer for r in person],
        "wikipedia_content": " ".join(r.answer for r in person) + "\n" + " ".join(r.paraphrase for r in person),
        "text_completion": [
            {"First_half": " ".join(w[: len(w) // 2]), "Second_half": " ".join(w[len(w) // 2 :]).rstrip(".")} for w in halves
        ],
        "unrelated_QA": [f" {r.prompt}\n" for r in facts], "unrelated_answers": [r.answer for r in facts],
    }  # fmt: skip
