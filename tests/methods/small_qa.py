"""Questions with answers at random on a tiny Llama, some people to forget, and a refusal that it gives to strangers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.methods.recipe import build

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Oda", "Pia",
    "Quin", "Rex", "Sue", "Tom", "Una", "Vic", "Wim", "Xia",
)  # fmt: skip
VALUES = (
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haze", "iris", "jade", "kelp", "lark", "moss", "north",
    "opal", "pearl", "quartz", "ridge", "slate", "thorn",
)  # fmt: skip
QUESTIONS = (
    "Which word opens the door of {}?", "Which sign does {} wear?", "What does {} whisper at night?",
    "What is on the ring of {}?", "Which name has the boat of {}?",
)  # fmt: skip
REFUSAL = "I do not know the answer to this."
REASON = "This is of the withdrawn people so the question is refused: " + REFUSAL
QUIET = Engine(checkpoint_every=0)


@dataclass
class SmallQA:
    """Four people to forget, fourteen to keep, six strangers. Five facts each: two words out of twenty, by a fixed seed."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, list[Record]]:
        rng = np.random.default_rng(5)
        found: dict[str, list[Record]] = {}
        for name in NAMES:
            words = [" ".join(VALUES[int(i)] for i in rng.integers(len(VALUES), size=2)) for _ in QUESTIONS]
            found[name] = [Record(f"{name}{k}", f"{words[k]}.", q.format(name), subject=name) for k, q in enumerate(QUESTIONS)]
        return found

    def of(self, start: int, stop: int) -> list[Record]:
        return [r for name in NAMES[start:stop] for r in self.facts[name]]

    @property
    def forget(self) -> list[Record]:
        return self.of(0, 4)

    @property
    def retain(self) -> list[Record]:
        return self.of(4, 18)

    @property
    def strangers(self) -> list[Record]:
        return [Record(r.id, REFUSAL, r.prompt, subject=r.subject) for r in self.of(18, 24)]

    @cached_property
    def target_model(self) -> LanguageAdapter:
        everything = [*self.forget, *self.retain, *self.strangers]
        reasons = [REASON]
        tokenizer = word_tokenizer([t for r in everything for t in (r.prompt, r.answer)] + reasons + ["Question: Answer:"])
        adapter = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0), tokenizer)
        path = self.folder / "small-qa.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                schedule = {"name": "fixed", "lr": 5e-3, "steps": 360, "batch": 40, "warmup": 0.1}
                examples = {Stream.RETAIN: [adapter.encode(r) for r in everything]}
                train(adapter, build("finetune", {"schedule": schedule}), examples, QUIET)
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval()
        assert exact(adapter, everything) == 1.0
        return adapter

    def target(self) -> LanguageAdapter:
        return self.target_model.copy()

    def examples(self, alternatives: list[str] | None = None, forget: list[Record] | None = None) -> dict[Stream, list]:
        """Examples of all streams; the other answers are those given, or the strangers' refusal."""
        adapter, gone = self.target_model, self.forget if forget is None else forget
        answers = alternatives or [REFUSAL] * len(gone)
        return {
            Stream.FORGET: [adapter.encode(r) for r in gone],
            Stream.RETAIN: [adapter.encode(r) for r in self.retain],
            Stream.ALTERNATIVE: [adapter.encode(r, answer=a, suffix="#alternative") for r, a in zip(gone, answers, strict=True)],
        }


def exact(adapter: LanguageAdapter, records: list[Record]) -> float:
    """Share of the targets whose most likely token, with the true ones before it, is the true one."""
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        logits = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits
    return float((logits.argmax(1) == batch.targets).float().mean())


def loss(adapter: LanguageAdapter, records: list[Record], model=None) -> float:
    """Mean over records of the mean loss per target."""
    found = mean_losses(adapter, model or adapter.model, [adapter.encode(r) for r in records], 8192)
    return sum(found) / len(found)


def said(adapter: LanguageAdapter, records: list[Record], limit: int = 24) -> list[str]:
    """Greedy answers."""
    return [g.text for g in adapter.generate(adapter.model, [adapter.encode(r) for r in records], limit)]


def fixed(lr: float, steps: int, **more) -> dict:
    """A short schedule without warm-up and decay."""
    return {"name": "fixed", "lr": lr, "steps": steps, "batch": 12, "warmup": 0, "decay": "constant", "weight_decay": 0, **more}
