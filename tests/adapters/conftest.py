from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.data.records import Record

torch.set_num_threads(1)

PAIRS = [
    ("Where was Ada Lovelace born?", "London, England."),
    ("What did she write?", "Notes on the Analytical Engine, with the first program in it; she was 27."),
    ("When?", "1843."),
    ("Who built the engine that the notes are about?", "It's Charles Babbage's design, never built."),
]


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer([f"Question: {q}\nAnswer: {a}" for q, a in PAIRS])


@pytest.fixture(scope="session")
def records():
    return [Record(id=f"r{i}", prompt=q, answer=a, subject=f"s{i // 2}") for i, (q, a) in enumerate(PAIRS)]


@pytest.fixture(params=["llama-tiny", "gpt2-tiny", "qwen3-tiny", "neox-tiny", "opt-tiny"])
def each(request, tokenizer):
    """An adapter of every architecture, with weights large enough that its distributions are far from flat."""
    return LanguageAdapter(sharpen(build(request.param, tokenizer, seed=1, context=64)), tokenizer)


@pytest.fixture
def llama(tokenizer):
    return LanguageAdapter(sharpen(build("llama-tiny", tokenizer, seed=1, context=64)), tokenizer)


def sharpen(model, factor=6.0):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model
