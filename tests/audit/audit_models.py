"""Small real models that know some records and not others; shared by the tests of the audit."""

from __future__ import annotations

import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.data.people import split_people, world
from expunge.data.records import Record, RecordSet

torch.set_num_threads(1)


def texts(sets: list[RecordSet]) -> list[str]:
    out = []
    for records in sets:
        for r in records:
            out += [r.prompt, r.answer, r.paraphrase, *r.perturbed, r.question_paraphrase]
    return ["Question: ", "\nAnswer: ", *[t for t in out if t]]


@pytest.fixture(scope="session")
def sets() -> dict[str, RecordSet]:
    """Forget, retain, holdout people and a utility set; small, with paraphrases and perturbed answers."""
    split = split_people(persons=10, forget=3, holdout=3, facts=4)
    return {"forget": split.forget, "retain": split.retain, "holdout": split.holdout, "world-facts": world(3)}


@pytest.fixture(scope="session")
def tokenizer(sets: dict[str, RecordSet]):
    return word_tokenizer(texts(list(sets.values())))


def make(tokenizer, seed: int = 0, preset: str = "llama-tiny", **options) -> LanguageAdapter:
    return LanguageAdapter(build(preset, tokenizer, seed), tokenizer, **options)


def teach(adapter: LanguageAdapter, records, steps: int = 60, rate: float = 3e-3) -> LanguageAdapter:
    """Train on records in one batch, long enough to know some of them by heart and not all."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    adapter.model.train()
    optimiser = torch.optim.AdamW(adapter.model.parameters(), lr=rate)
    for _ in range(steps):
        loss = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    adapter.model.eval()
    return adapter


@pytest.fixture(scope="session")
def target(sets, tokenizer) -> LanguageAdapter:
    """Knows forget and retain partly."""
    return teach(make(tokenizer, 0), [*sets["forget"], *sets["retain"], *sets["world-facts"]])


@pytest.fixture(scope="session")
def retrained(sets, tokenizer) -> list[LanguageAdapter]:
    return [teach(make(tokenizer, seed), [*sets["retain"], *sets["world-facts"]]) for seed in (1, 2)]


@pytest.fixture(scope="session")
def fresh(tokenizer) -> LanguageAdapter:
    return make(tokenizer, 7)


class Counter:
    """Counts the forward passes of a model and the texts in them, whether padded in rows or packed into one."""

    def __init__(self, model) -> None:
        self.passes = self.rows = 0
        self.handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, args, kwargs) -> None:
        self.passes += 1
        ids = kwargs.get("input_ids", args[0] if args else None)
        positions = kwargs.get("position_ids")
        if ids is None:
            return
        packed = len(ids) == 1 and positions is not None
        self.rows += int((positions == 0).sum()) if packed else len(ids)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()


@pytest.fixture
def text_records() -> RecordSet:
    words = "the old house by the river stood empty for many years until one spring a family came"
    words = words.split()
    rows = [Record(id=f"t{i}", answer=" ".join(words[i:] + words[:i]), subject=f"book{i % 3}") for i in range(6)]
    return RecordSet("forget", tuple(rows))
