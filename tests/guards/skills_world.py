"""A tiny Llama that copies and reverses strings of digits which it has never seen."""

from __future__ import annotations

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
from expunge.data.skills import skill
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL

LENGTH = (3, 3)


@dataclass
class SkillsWorld:
    """Two skills, and a model that has both."""

    folder: Path

    def records(self, name: str, n: int = 400, held_out: bool = False) -> list:
        return list(skill(name, n, length=LENGTH, held_out=held_out))

    @cached_property
    def adapter(self) -> LanguageAdapter:
        records = [*self.records("copy"), *self.records("reverse")]
        texts = [t for r in records for t in (r.prompt, r.answer, " " + r.answer)]
        tokenizer = word_tokenizer([*texts, DEFAULT_TEMPLATE])
        made = LanguageAdapter(build("llama-tiny", tokenizer, seed=0), tokenizer)
        path = self.folder / f"skills-{torch.__version__}.pt"
        with FileLock(str(path) + ".lock"):
            if not path.is_file():
                schedule = Fixed(lr=4e-3, epochs=30, batch=32, warmup=1, weight_decay=0.01)
                recipe = compose("train", retain=[NLL()], schedule=schedule)
                train(made, recipe, {Stream.RETAIN: [made.encode(r) for r in records]}, Engine(seed=0))
                torch.save(made.model.state_dict(), path)
        made.model.load_state_dict(torch.load(path, weights_only=True))
        made.model.eval()
        return made
