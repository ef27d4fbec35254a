"""A small world that tests share: people, a target model that has learnt them by heart, and its retrained twins.

Models are trained once a session for all workers, and kept under a name made of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.people import PeopleSplit, split_people, world
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL

TRAINING = Fixed(lr=5e-3, epochs=40, batch=16, warmup=1, weight_decay=0.01)
WIDTH = 64  #: at which TRAINING's rate is right; wider models take a lower one in proportion


@dataclass
class World:
    """People to forget, to keep and never seen; and models of them."""

    folder: Path
    preset: str = "llama-tiny"
    persons: int = 24
    forget_persons: int = 3
    facts: int = 10

    @cached_property
    def split(self) -> PeopleSplit:
        return split_people(persons=self.persons, forget=self.forget_persons, holdout=6, seed=1, facts=self.facts)

    @cached_property
    def trained_on(self) -> list[Record]:
        return [*self.split.forget, *self.split.retain, *world()]

    @cached_property
    def tokenizer(self):
        records = [*self.trained_on, *self.split.holdout]
        texts = [t for r in records for t in (r.prompt, r.answer, r.paraphrase, r.question_paraphrase, *r.perturbed) if t]
        return word_tokenizer([*texts, DEFAULT_TEMPLATE])

    def fresh(self, seed: int = 0) -> LanguageAdapter:
        return LanguageAdapter(build(self.preset, self.tokenizer, seed=seed), self.tokenizer)

    def encode(self, records) -> list:
        adapter = self.fresh()
        return [adapter.encode(r) for r in records]

    @cached_property
    def examples(self) -> dict[Stream, list]:
        """Forget, retain (the world's facts among them) and alternative examples."""
        adapter = self.fresh()
        kept = [*self.split.retain, *world()]
        return {
            Stream.FORGET: [adapter.encode(r) for r in self.split.forget],
            Stream.RETAIN: [adapter.encode(r) for r in kept],
            Stream.ALTERNATIVE: [adapter.encode(r, answer=r.perturbed[0], suffix="#alternative") for r in self.split.forget],
        }

    def _trained(self, records: list[Record], seed: int) -> LanguageAdapter:
        adapter = self.fresh(seed)
        schedule = TRAINING.model_copy(update={"lr": TRAINING.lr * WIDTH / adapter.model.config.hidden_size})
        key = [self.preset, seed, schedule.model_dump(mode="json"), [[r.prompt, r.answer] for r in records], torch.__version__]
        path = self.folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24] + ".pt")
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                recipe = compose("train", retain=[NLL()], schedule=schedule)
                train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in records]}, Engine(seed=seed))
                torch.save(adapter.model.state_dict(), path)
        adapter.model.load_state_dict(torch.load(path, weights_only=True))
        adapter.model.eval()
        return adapter

    def target(self, seed: int = 0) -> LanguageAdapter:
        """Trained on everything; a new copy at each call."""
        return self._trained(self.trained_on, seed)

    def retrained(self, seed: int = 1) -> LanguageAdapter:
        """Trained without the people to forget; a new copy at each call."""
        return self._trained([*self.split.retain, *world()], seed)

    def loss(self, adapter: LanguageAdapter, records, model=None) -> float:
        """Mean over records of the mean loss per target."""
        losses = mean_losses(adapter, model or adapter.model, [adapter.encode(r) for r in records], 8192)
        return sum(losses) / len(losses)
