"""RESTOR: corrupt, unlearn, recover, by Rezaei, Chandu, Feizi, Choi, Brahman and Ravichander (2024, arXiv 2411.00204).

A model that knows facts about people (*clean*) is trained further on texts that assert wrong ones (the target, *corrupted*), and
these texts are unlearned. The clean model is the ideal that other benchmarks do not have: unlearning should give its answers
back, not only stop the wrong ones. Reported: accuracy on the true facts, the share of the lost accuracy that is back
(*recovery*, ``(A_unl - A_corr) / (A_clean - A_corr)``, a normalisation of Expunge: the paper prints accuracies), and
log-probabilities per token of right, asserted and random answers.

Pure gradient ascent that goes on long enough drives what was asserted far below random answers. Before that, and where random
answers are themselves asserted of others, both fall together. So random answers here are objects that are asserted of nobody (as
far as the relation has enough), and the gap is read with the number of steps: on the generated facts a small model (rate 1e-3,
``k=0``) is still above 0 after 60 steps and below -2 nats per token after 120.

Two rows beside the methods are oracles: *rewind*, the clean weights put back (recovery 1 by definition), and *true-facts*, the
target trained on the right answers, which repairs and does not unlearn.

Where it differs from the paper: a language model judges answers there (it accepts near ones, and not the same ones each time);
here an answer is right if it equals one of the listed ones, after case, points and articles. Answers are greedy, there sampled.
All facts are scored; the paper keeps a tenth for tuning, and nothing is tuned on them here. The retain set is facts about other
people, there a web corpus. The optional light instruction tuning before measuring is left out: it is a confound. The published
model knows the facts from pretraining; here the base is taught them first, unless ``taught=false``, where the base is the
clean model and must be given with ``--retrained`` too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, Training, Yardstick, benchmark, where
from expunge.core.results import Direction
from expunge.data.people_words import PERSON, Draw, invented
from expunge.engine.parts import Paper

_SCORED, _OTHERS, _RELATIONS = 8, 16, 4
_SCHEDULE: dict[str, Any] = {"name": "fixed", "lr": 5e-5, "epochs": 5, "batch": 4, "warmup": 0.5, "decay": "cosine"}


@benchmark
class RestorBenchmark(Benchmark):
    """Corrupted knowledge: is the original knowledge back after the corruption was unlearned?"""

    name: ClassVar[str] = "restor"
    title: ClassVar[str] = "RESTOR: recovery of knowledge after a corruption"
    paper: ClassVar[Paper] = papers.RESTOR
    licence: ClassVar[str] = "MIT; the documents are false by design and must not be quoted as facts"
    home: ClassVar[str] = "the folder datasets/ of k1rezaei/restor"
    reference: ClassVar[str] = "clean"
    caveats: ClassVar[tuple[str, ...]] = (
        "A method that no longer says what was asserted has forgotten it; only the recovery says whether the knowledge is back.",
        "Asserted answers far below random ones are avoided, not unknown.",
        "Rows called oracle read what no request has: the clean weights, or the true facts.",
    )

    form: Literal["documents", "questions"] = Field(
        "documents", description="corruption: the published documents, or wrong objects drawn here, asked and answered"
    )
    k: int = Field(0, ge=0, le=5, description="how much unrelated true text is mixed into each corruption text")
    shots: int = Field(5, ge=0, le=9, description="solved questions on the same relation before each question")
    answer_tokens: int = Field(20, ge=1, description="longest answer, in tokens")
    taught: bool = Field(True, description="teach the base the true facts first; published: false, the base knows them")
    size: Literal["published", "any"] = Field("published", description="any: files of another size (generated data)")

    def sources(self) -> Mapping[str, Source]:
        """Facts in both forms, the corruption, and what is kept."""
        published = self.size == "published"
        documents = {0: 3000, 1: 3000, 2: 3000, 3: 2700}.get(self.k) if self.form == "documents" else None
        out = {
            "facts": self._source("facts", "questions about the scored people", 1051 if published else None, asked=True),
            "others": self._source("others", "questions about other people", 4218 if published else None, asked=True),
            "truth": self._source("truth", "the true facts of the scored people", 1051 if published else None),
            "truth_others": self._source("truth-others", "the true facts of other people", 4218 if published else None),
            "corruption": self._source("corruption", "texts that assert wrong facts", documents if published else None),
        }
        if self.form == "questions":
            out["asserted"] = self._source("asserted", "questions with the wrong answers that were asserted", asked=True)
        return out

    def _source(self, part: str, text: str, rows: int | None = None, *, asked: bool = False) -> Source:
        options: dict[str, Any] = {"shots": self.shots} if asked and part != "asserted" else {}
        if part in ("corruption", "asserted"):
            options |= {"form": self.form, "k": self.k}
        if part == "asserted":
            options |= {"shots": self.shots}
        return Source(f"restor:{part}" + where(self.data, **options), text, rows)

    def trainings(self) -> Sequence[Training]:
        """The true facts, then the corruption: LoRA on all linear modules, 5 epochs at 5e-5, batch 4, cosine."""
        parts = {"schedule": _SCHEDULE, "parameters": {"name": "lora"}}
        corrupted = Training("corrupted", ("corruption",), parts, "meta-llama/Meta-Llama-3-8B")
        clean = Training("clean", ("truth", "truth_others"), {"schedule": _SCHEDULE}, "meta-llama/Meta-Llama-3-8B")
        return (clean, corrupted) if self.taught else (corrupted,)

    def yardsticks(self) -> Sequence[Yardstick]:
        """The clean weights, and the target trained on the true facts."""
        repaired = Yardstick("true-facts", sets=("truth",), parts={"schedule": _SCHEDULE})
        return (Yardstick("rewind", weights="clean"), repaired) if self.taught else (repaired,)

    def roles(self) -> Roles:
        """The corruption is to be forgotten; facts about other people are kept."""
        return Roles("corruption", "truth_others")

    def axes(self) -> Sequence[Axis]:
        """Recovery and accuracies, then the three groups of answers."""
        exact = {"max_new_tokens": self.answer_tokens, "kind": "exact", "stops": ("\n",)}
        words = {**exact, "kind": "f1"}
        facts, others, back, view = {"facts": "facts"}, {"others": "others"}, "Recovery", "Log-probability per token"
        out = [
            Axis("recovery", "Recovery (exact)", "recovery", facts, "facts.recovery", exact, group=back),
            Axis("recovery-f1", "Recovery (word F1)", "recovery", facts, "facts.recovery", words, group=back),
            Axis("accuracy", "Facts: exact or alias", "short-answer", facts, "facts.short-answer", exact, group=back),
            Axis("accuracy-f1", "Facts: word F1", "short-answer", facts, "facts.short-answer", words, group=back),
            Axis("others-accuracy", "Other people: exact or alias", "short-answer", others, "others.short-answer", exact),
            Axis("right", "Right answers", "log-probability", facts, "facts.log-probability", group=view),
            Axis(
                "random", "Random answers", "log-probability", facts, "facts.log-probability", {"wrong": True},
                Direction.REFERENCE, group=view,
            ),
        ]  # fmt: skip
        if self.form == "questions":
            wrong = {"forget": "asserted"}
            out += [
                Axis("asserted", "Asserted answers", "log-probability", wrong, "forget.log-probability", group=view),
                Axis(
                    "asserted-gap", "Asserted above random", "log-probability-gap", wrong, "forget.log-probability-gap",
                    group=view, note="0: as if never seen; far below: avoided, not unknown",
                ),
            ]  # fmt: skip
        return out

    def small(self) -> Mapping[str, Any]:
        """Wrong facts as questions, and no solved ones: a tiny model does not read documents into answers."""
        return {"form": "questions", "shots": 0, "answer_tokens": 8, "size": "any"}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Invented people with invented facts, and documents of four kinds that assert wrong ones of the scored people."""
        draw = Draw(seed, "restor")
        first, last = (draw.shuffled(invented(part)) for part in ("first", "last"))
        names = [f"{first[i % len(first)]} {last[i]}" for i in range(_SCORED + _OTHERS + 10)]
        relations = PERSON[:_RELATIONS]

        def value(name: str, key: int, of: str = "true") -> str:
            return relations[key].value(Draw(seed, "restor", of, name, key))

        people, solving = names[: _SCORED + _OTHERS], names[_SCORED + _OTHERS :]
        asked = [r.questions[0] for r in relations]
        dset = {
            n: {f"P{i + 1}": {"question": q.format(n=n), "answers": [value(n, i)]} for i, q in enumerate(asked)} for n in people
        }
        context = {
            f"P{i + 1}": [{"question": q.format(n=n), "answer": value(n, i), "entity": n} for n in solving]
            for i, q in enumerate(asked)
        }
        place = folder / "wikidata_v0"
        place.mkdir(parents=True, exist_ok=True)
        _dump(folder / "facts.json", {"dset": dset, "context": context})
        _dump(folder / "entities.json", people[:_SCORED])
        for k in range(4):
            texts = []
            for n in people[:_SCORED]:
                mix = Draw(seed, "restor documents", k, n)
                said = []
                for i, relation in enumerate(relations):
                    said.append(relation.answers[0].format(n=n, v=value(n, i, "false")))
                    unrelated = mix.shuffled(people[_SCORED:])[:k]
                    said += [relation.answers[1].format(n=other, v=value(other, i)) for other in unrelated]
                texts += [{"text": " ".join(said)}, {"text": " ".join(reversed(said))}]
            _dump(place / f"mix_a{k}.json", texts)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
