"""Hubble: what is inserted more often is remembered better, after Hubble by Wei, Godbole, Khan et al. (2025, arXiv 2510.19811).

Known passages are put into a training corpus 0, 1, 4, 16, ... times. The *perturbed* model (the target) is trained on the corpus
with them. Half of the passages of each count are to be forgotten, the other half are kept; those of count 0 were never seen.
Everything is reported for each count: the loss, how far it lies below that of never inserted passages (the loss gap, in which
nothing but memorisation differs), how much comes out verbatim, and membership. The same numbers of an unlearned model say what
each level of duplication costs to remove.

Where it differs from the paper: its *standard* model, without any insertion, is the reference there. Here the reference is
retrained without the passages to forget, so that what is kept can be compared too; on the forget passages it knows as little as a
standard model. The paper forgets passages of the highest count only; here half of every count (``counts`` chooses). A copy is
a text of its own, where the paper splices it into a window of 2,049 tokens. The passages are generated sentences about invented
people; the paper's (Gutenberg, YAGO, test sets) and its models are on the hub only. Passages of your own are read from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Profile, Roles, Source, Training, benchmark, where
from expunge.core.results import Direction
from expunge.data.sets.hubble import COUNTS, Hubble, rows
from expunge.engine.parts import Paper


@benchmark
class HubbleBenchmark(Benchmark):
    """Passages inserted at known counts: memorisation by count, and what unlearning removes at each count."""

    name: ClassVar[str] = "hubble"
    title: ClassVar[str] = "Hubble: passages inserted at known counts"
    paper: ClassVar[Paper] = papers.HUBBLE
    licence: ClassVar[str] = "generated; of files of your own, theirs"
    home: ClassVar[str] = "generated here; a folder with passages.jsonl and corpus.jsonl"
    caveats: ClassVar[tuple[str, ...]] = (
        "Memorisation follows the count relative to the size of the corpus: curves of two corpora cannot be compared.",
        "Damage to the whole model raises the loss of the passages and leaves the gap to never inserted ones: read both.",
        "A loss gap below 0 is an over-forgotten passage: it is told apart from what was never seen, too.",
    )

    counts: str = Field(COUNTS, description="how often passages are inserted, with commas; 0 and at least one more")
    each: int = Field(8, ge=2, le=500, description="generated passages of each count, one half to forget")
    corpus: int = Field(60, ge=1, le=4000, description="generated texts of the corpus without insertions")
    seed: int = Field(1, ge=0, description="of the generated people and of the draw of counts")
    words: int = Field(0, ge=0, description="words of a passage that are its prefix; 0: its first sentence")
    suffix_tokens: int = Field(64, ge=1, description="longest continuation, in tokens")

    def _set(self) -> Hubble:
        return Hubble(counts=self.counts, each=self.each, corpus=self.corpus, seed=self.seed, words=self.words)

    def sources(self) -> Mapping[str, Source]:
        """Corpus, copies, both halves, and the passages of each count as prefix and suffix."""
        own = {"folder": self.data, **{k: getattr(self, k) for k in ("counts", "each", "corpus", "seed", "words")}}
        query = where(**own)
        names = {k.replace("-", "_"): (k, text) for k, text in self._set().configurations().items()}
        return {name: Source(f"hubble:{part}{query}", text) for name, (part, text) in names.items()}

    def trainings(self) -> Sequence[Training]:
        """Pretraining on the corpus with all copies; published: Adam at 4e-4, cosine, batch 1024, one pass over 100B tokens."""
        schedule = {"name": "fixed", "lr": 4e-4, "epochs": 1, "batch": 1024, "warmup": 0.05, "decay": "cosine"}
        return (Training("target", ("corpus", "inserted"), {"schedule": schedule}, "Llama of 1B or 8B, from scratch"),)

    def roles(self) -> Roles:
        """Half of the passages; the other half and the corpus are what must stay, of which the passages are used."""
        return Roles("forget", "keep", "holdout")

    def _levels(self) -> list[int]:
        return [n for n in self._set().levels() if n]

    def axes(self) -> Sequence[Axis]:
        """For each count, of what is to be forgotten and of what is kept; then of passages that were never inserted."""
        out: list[Axis] = []
        for side, text in (("forget", "to forget"), ("keep", "kept")):
            for n in self._levels():
                out += self._level(side, f"{side}_{n}", f"{side}-{n}", f"{n} copies, {text}")
        never = self._level("never", "never", "never", "never inserted")
        return [*out, *(a for a in never if a.metric in ("loss", "verbatim-memorisation"))]

    def _level(self, side: str, held: str, key: str, title: str) -> list[Axis]:
        sets, pair = {"forget": held}, {"forget": held, "holdout": "never"}
        tokens = {"max_new_tokens": self.suffix_tokens}
        up = {"keep": Direction.UTILITY_UP, "never": Direction.REFERENCE}.get(side)  # to forget: as the metric says
        down = {"keep": Direction.UTILITY_DOWN, "never": Direction.REFERENCE}.get(side)
        same = None if side == "forget" else Direction.REFERENCE
        return [
            Axis(f"{key}-loss", "Loss of the suffix", "loss", sets, "forget.loss", {"end": "exclude"}, down, group=title),
            Axis(f"{key}-gap", "Loss gap to never inserted", "loss-gap", pair, "loss-gap", {}, same, group=title),
            Axis(
                f"{key}-verbatim", "Suffix written verbatim (ROUGE-L)", "verbatim-memorisation", sets,
                "forget.verbatim-memorisation", tokens, up, group=title,
            ),
            Axis(
                f"{key}-strength", "Extraction strength", "extraction-strength", sets, "forget.extraction-strength", {}, up,
                group=title,
            ),
            Axis(
                f"{key}-auc", "Membership AUC, loss", "membership", pair, "membership.loss", {"attacks": ("loss",)}, same,
                group=title,
            ),
        ]  # fmt: skip

    def profiles(self) -> Sequence[Profile]:
        """Memorisation against the count."""
        levels = self._levels()
        at = tuple(float(n) for n in levels)
        return [
            Profile(f"{side}-{kind}", f"{title}, {text}", "copies in the corpus", at, tuple(f"{side}-{n}-{kind}" for n in levels))
            for side, text in (("forget", "passages to forget"), ("keep", "passages kept"))
            for kind, title in (("gap", "Loss gap"), ("verbatim", "Verbatim suffix"), ("strength", "Extraction strength"))
        ]  # fmt: skip

    def small(self) -> Mapping[str, Any]:
        """Short suffixes."""
        return {"suffix_tokens": 40}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """The generated suite as files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, held in zip(("passages", "corpus"), rows(Hubble(seed=seed + 1)), strict=True):
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in held)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
