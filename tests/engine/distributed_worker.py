"""Run by ``accelerate launch`` in tests: trains a few steps and saves the weights."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as build_model
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.people import split_people
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build


def main(out: Path, method: str, parts: str, mode: str = "") -> None:
    split = split_people(persons=8, forget=2, holdout=2, seed=3)
    records = [*split.forget, *split.retain]
    tokenizer = word_tokenizer([t for r in records for t in (r.prompt, r.answer)] + [DEFAULT_TEMPLATE])
    adapter = LanguageAdapter(build_model("llama-tiny", tokenizer, seed=1), tokenizer)
    examples = {
        Stream.FORGET: [adapter.encode(r) for r in split.forget],
        Stream.RETAIN: [adapter.encode(r) for r in split.retain],
        Stream.ALTERNATIVE: [adapter.encode(r, answer=r.perturbed[0], suffix="#alternative") for r in split.forget],
    }
    recipe = build(method, json.loads(parts))
    # 300 tokens a forward pass: several per step, and not the same number in both processes.
    engine = Engine(max_tokens=300, device="cpu", checkpoint_every=2 if mode else 0)
    folder = out.parent / "run" if mode else None

    def observe(step: int, _: object) -> None:
        if mode == "killed" and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    goal = Goal(loss=9.0, source="holdout", examples=1)
    outcome = train(adapter, recipe, examples, engine, goal=goal, folder=folder, resume=mode == "resumed", observe=observe)
    state = {n: p.detach().cpu() for n, p in outcome.state().items()}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"weights": state, "losses": [row["loss"] for row in outcome.history], "lr": outcome.lr}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
