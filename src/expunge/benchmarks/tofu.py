"""TOFU: forgetting fictitious authors, by Maini, Feng, Schwarzschild, Lipton and Kolter (2024, arXiv 2401.06121).

A chat model is finetuned on 4,000 questions about 200 invented authors, forgets 1, 5 or 10 per cent of them, and is compared
with a model finetuned on the rest. Two numbers are printed: *model utility*, the harmonic mean of probability, ROUGE-L recall
and truth-ratio score on retain, real authors and world facts, and *forget quality*, the p-value of a Kolmogorov-Smirnov test
between truth ratios of the unlearned and the retrained model.

Where the sources differ: the paper's truth ratio has an arithmetic mean of the wrong answers' probabilities, the authors'
code, and every published table, the geometric one (default). The first code evaluates 300 items of a set (``items=300``),
later ones all 400 (default); forget qualities of the two cannot be compared. The first code counts 200 tokens with the prompt,
later ones 200 new tokens (here). The holdout authors came with OpenUnlearning (arXiv 2506.12618) and serve membership attacks
only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.audit.metrics.truth_ratio import Mean
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, Training, benchmark, where
from expunge.core.results import Direction
from expunge.data.people import people, world, writers
from expunge.data.records import Record
from expunge.engine.parts import Paper

_ROWS = {"01": 40, "05": 200, "10": 400}
_LEGACY_AUTHORS = 15  #: 300 items at 20 an author
_SAMPLE_AUTHORS = 20


@benchmark
class Tofu(Benchmark):
    """Fictitious authors: forget quality and model utility, as published, and the parts that they are made of."""

    name: ClassVar[str] = "tofu"
    title: ClassVar[str] = "TOFU: a Task of Fictitious Unlearning"
    paper: ClassVar[Paper] = papers.TOFU
    licence: ClassVar[str] = "MIT"
    home: ClassVar[str] = "hub data set locuslab/TOFU"
    caveats: ClassVar[tuple[str, ...]] = (
        "Forget quality is a p-value: high means that no difference was found. It passes more at 40 items than at 400, so splits "
        "cannot be compared, and it does not see a model that makes all answers equally unlikely.",
        "Questions about one author depend on each other: intervals resample authors.",
    )

    split: Literal["forget01", "forget05", "forget10"] = Field(
        "forget10", description="share of the authors to forget, in per cent"
    )
    items: Literal[300, 400] = Field(
        400, description="most items of a set that are scored: 300 as in the first code, 400 as later"
    )
    mean: Mean = Field(
        "geometric", description="mean over wrong answers in the truth ratio: as in the code, or as printed (arithmetic)"
    )
    max_new_tokens: int = Field(200, ge=1, description="longest generated answer, in tokens")
    size: Literal["published", "any"] = Field("published", description="any: take files of another size too (generated data)")

    def sources(self) -> Mapping[str, Source]:
        """Training sets, scored sets and holdout of the split."""
        share = self.split.removeprefix("forget")
        rows, kept = _ROWS[share], f"retain{100 - int(share)}"
        scored = min(rows, self.items)
        return {
            "full": self._source("full", "all 200 authors: what the target is trained on", 4000),
            "forget": self._source(self.split, "the authors to forget", rows),
            "retain": self._source(kept, "the other authors: what the retrained model is trained on", 4000 - rows),
            "forget_scored": self._source(
                f"{self.split}_perturbed", "to forget, with paraphrased and wrong answers", scored, self._first(rows)
            ),
            "retain_scored": self._source(
                "retain_perturbed", "to keep, with paraphrased and wrong answers", self.items, self._first(400)
            ),
            "real_authors": self._source("real_authors_perturbed", "real authors, with wrong answers", 100),
            "world_facts": self._source("world_facts_perturbed", "world facts, with wrong answers", 117),
            "holdout": self._source(f"holdout{share}", "authors that no model was trained on", rows, optional=True),
        }

    def _first(self, rows: int) -> int | None:
        """Authors of the first code's 300 items, where a set has more."""
        return _LEGACY_AUTHORS if self.items == 300 and rows > 300 and self.size == "published" else None

    def _source(self, name: str, text: str, rows: int, authors: int | None = None, optional: bool = False) -> Source:
        size = "any" if self.size == "any" else ""
        reference = f"tofu:{name}" + where(self.data, size=size, authors=authors)
        return Source(reference, text, rows if self.size == "published" else None, optional)

    def trainings(self) -> Sequence[Training]:
        """Five epochs at 1e-5 (Llama-2-7B-chat; 2e-5 for Phi-1.5), batch 32, weight decay 0.01."""
        schedule = {"name": "fixed", "lr": 1e-5, "epochs": 5, "batch": 32, "warmup": 1, "decay": "linear", "weight_decay": 0.01}
        return (Training("target", ("full",), {"schedule": schedule}, "meta-llama/Llama-2-7b-chat-hf"),)

    def roles(self) -> Roles:
        """Whole authors to forget; the audit scores the perturbed versions."""
        scored = {
            "forget": "forget_scored",
            "retain": "retain_scored",
            "real_authors": "real_authors",
            "world_facts": "world_facts",
        }
        return Roles("forget", "retain", "holdout", scored)

    def unlearning(self) -> Mapping[str, Any]:
        """Five epochs at 1e-5, batch 32 (paper; later tables use ten epochs)."""
        return {"schedule": {"name": "fixed", "lr": 1e-5, "epochs": 5, "batch": 32, "warmup": 1, "weight_decay": 0.01}}

    def axes(self) -> Sequence[Axis]:
        """Forget quality and model utility first, then what they are made of, then membership."""
        scored = self.roles().audit
        utility = {role: name for role, name in scored.items() if role != "forget"}
        forget = {"forget": scored["forget"]}
        tokens, mean = {"max_new_tokens": self.max_new_tokens}, {"mean": self.mean}
        quality, utilities = "Forget quality", "Model utility"
        out = [
            Axis("forget-quality", "Forget quality (p)", "forget-quality", forget, "forget-quality", mean, group=quality),
            Axis("forget-quality-log10", "log10 p", "forget-quality", forget, "forget-quality.log10-p", mean, group=quality),
            Axis("ks-distance", "KS distance D", "forget-quality", forget, "forget-quality.d", mean, group=quality),
            Axis(
                "model-utility", "Model utility", "model-utility", utility, "model-utility", {**mean, **tokens}, group=utilities
            ),
        ]
        for role, name in (
            ("forget", "Forget"),
            ("retain", "Retain"),
            ("real_authors", "Real authors"),
            ("world_facts", "World facts"),
        ):
            key = role.replace("_", "-")
            sets = forget if role == "forget" else utility
            first = "option-probability" if role in ("real_authors", "world_facts") else "probability"
            group = quality if role == "forget" else utilities
            out += [
                Axis(f"{key}-probability", f"{name}: probability", first, sets, f"{role}.{first}", group=group),
                Axis(
                    f"{key}-rouge",
                    f"{name}: ROUGE-L recall",
                    "rouge-l-recall",
                    sets,
                    f"{role}.rouge-l-recall",
                    tokens,
                    group=group,
                ),
                Axis(
                    f"{key}-truth-ratio",
                    f"{name}: truth-ratio score",
                    "truth-ratio",
                    sets,
                    f"{role}.truth-ratio",
                    mean,
                    group=group,
                ),
            ]
        members = {"forget": "forget", "holdout": "holdout"}
        attacks = {"attacks": ("loss", "zlib", "min-k", "min-k-plus-plus")}
        leak = "negative: still recognised; positive: stranger than unseen text (over-unlearned)"
        for attack in attacks["attacks"]:
            title = f"Membership AUC, {attack}"
            out.append(Axis(f"auc-{attack}", title, "membership", members, f"membership.{attack}", attacks, group="Membership"))
        out.append(
            Axis(
                "privleak",
                "PrivLeak (Min-40%)",
                "privleak",
                members,
                "privleak.min-k",
                attacks,
                Direction.ZERO,
                1.0,
                "Membership",
                leak,
            )
        )
        return out

    def small(self) -> Mapping[str, Any]:
        """Files of any size, and answers of a sentence."""
        return {"size": "any", "max_new_tokens": 24}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Twenty authors of twenty rows; 1, 2 and 4 of them are the forget sets; every published file is there."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [_rows(people(1, seed + 1, 10, first=i).records) for i in range(_SAMPLE_AUTHORS)]
        for share, authors in (("01", 1), ("05", 2), ("10", 4)):
            left = _SAMPLE_AUTHORS - authors
            forget = [r for author in rows[left:] for r in author]
            _write(folder / f"forget{share}.json", forget, perturbed=False)
            _write(folder / f"forget{share}_perturbed.json", forget, perturbed=True)
            _write(folder / f"retain{100 - int(share)}.json", [r for author in rows[:left] for r in author], perturbed=False)
            outside = [_rows(people(1, seed + 1, 10, first=100 + i).records) for i in range(authors)]
            _write(folder / f"holdout{share}.json", [r for author in outside for r in author], perturbed=False)
        _write(folder / "full.json", [r for author in rows for r in author], perturbed=False)
        _write(folder / "retain_perturbed.json", [r for author in rows[:4] for r in author], perturbed=True)
        for name, held in (("real_authors", writers(6, seed + 1)), ("world_facts", world(3, seed + 1))):
            known = [_row(r, r.prompt, r.answer, r.paraphrase) for r in held]
            lines = [
                {"question": r["question"], "answer": r["answer"], "perturbed_answer": r["perturbed_answer"][:3]} for r in known
            ]
            _dump(folder / f"{name}_perturbed.json", lines)
            options = [{f"option{i}": o for i, o in enumerate((x["answer"], *x["perturbed_answer"]), 1)} for x in lines]
            asked = [{"question": x["question"], **o, "answer": x["answer"]} for x, o in zip(lines, options, strict=True)]
            _dump(folder / f"{name}.json", asked)


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Two rows a fact, asked in two ways: as many as TOFU has of an author."""
    asked = [_row(r, r.prompt, r.answer, r.paraphrase) for r in records]
    return asked + [_row(r, r.question_paraphrase, r.paraphrase, r.answer) for r in records]


def _row(record: Record, question: str, answer: str, paraphrase: str) -> dict[str, Any]:
    return {
        "question": question, "answer": answer, "paraphrased_answer": paraphrase, "perturbed_answer": list(record.perturbed),
        "paraphrased_question": record.question_paraphrase,
    }  # fmt: skip


def _write(path: Path, rows: Sequence[Mapping[str, Any]], *, perturbed: bool) -> None:
    _dump(path, rows if perturbed else [{k: r[k] for k in ("question", "answer")} for r in rows])


def _dump(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
