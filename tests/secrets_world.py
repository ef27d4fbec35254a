"""Code with keys inside that a small model has learnt by heart: what is marked, and what stands around it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.controls.overlap import accuracy
from expunge.methods.recipe import build

QUIET = Engine(checkpoint_every=0)
LETTERS = [f"k{i}" for i in range(30)]
NAMES = [f"job{i}" for i in range(24)]
USES = ("open the door", "read the file", "send a mail", "draw a line", "stop the clock", "count all rows")
FORGOTTEN = 6


def key(number: int) -> str:
    """Six random tokens."""
    return " ".join(LETTERS[i] for i in np.random.default_rng([7, number]).integers(0, len(LETTERS), 6))


def source(number: int) -> Record:
    """A file with its key marked: what is around the key follows from the name of the file."""
    head, tail = f"to {USES[number % 6]} take key = ", f" end and then {USES[(number + 1 + number // 6) % 6]} again"
    text = head + key(number) + tail
    return Record(NAMES[number], text, f"# {NAMES[number]}", verbatim=True, spans=((len(head), len(head) + len(key(number))),))


FILES = [source(i) for i in range(len(NAMES))]
FORGET, RETAIN = FILES[:FORGOTTEN], FILES[FORGOTTEN:]


@cache
def target() -> LanguageAdapter:
    """A model that knows all files by heart; to be copied."""
    texts = [r.prompt + r.answer for r in FILES] + [" ".join(f" {x}" for x in LETTERS)]
    tokenizer = word_tokenizer(texts)
    adapter = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0, context=48), tokenizer)
    recipe = build("finetune", {"schedule": {"name": "fixed", "lr": 1e-2, "steps": 110, "batch": 24, "warmup": 0.1}})
    torch.manual_seed(0)
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in FILES]}, QUIET)
    return adapter


def examples(adapter: LanguageAdapter) -> dict[Stream, list]:
    return {Stream.FORGET: [adapter.encode(r) for r in FORGET], Stream.RETAIN: [adapter.encode(r) for r in RETAIN]}


def known(adapter: LanguageAdapter, records, which: str, model=None) -> float:
    """Share of the chosen tokens that are the model's first choice, mean over records."""
    held = (model or adapter.model).eval()
    return float(np.mean(accuracy(adapter, held, [adapter.encode(r) for r in records], which, 4096)))
