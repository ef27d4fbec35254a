"""One untrained tiny model that can read a benchmark's generated data: enough to hold every axis to the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.audit.run import AuditedModel
from expunge.benchmarks.registry import BENCHMARKS, Benchmark
from expunge.benchmarks.run import load_all
from expunge.data.records import RecordSet
from expunge.pipeline.models import all_texts


def sampled(name: str, folder: Path, **options: object) -> Benchmark:
    """A benchmark with its own generated data."""
    kind = BENCHMARKS.get(name)
    kind().sample(folder)
    return kind(**{**kind().small(), "data": str(folder), **options})


def small_model(sets: Sequence[RecordSet], seed: int = 0, context: int = 2048) -> LanguageAdapter:
    """A random tiny Llama with the words of the sets."""
    tokenizer = word_tokenizer([*all_texts(sets), DEFAULT_TEMPLATE])
    return LanguageAdapter(build("llama-tiny", tokenizer, seed=seed, context=context), tokenizer)


def untrained(benchmark: Benchmark) -> tuple[dict[str, RecordSet], list[AuditedModel]]:
    """The sets, and three random models in the roles of target, retrained and unlearned."""
    sets = load_all(benchmark)[0]
    roles = ("target", "retrained", "unlearned")
    return sets, [AuditedModel(r, r, small_model(list(sets.values()), seed=i)) for i, r in enumerate(roles)]
