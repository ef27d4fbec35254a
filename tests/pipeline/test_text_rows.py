"""Texts from a file through a transformers classifier to its unlearning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import expunge
from expunge.adapters.supervised import ClassifierAdapter
from expunge.adapters.words import word_tokenizer
from expunge.engine.functional import class_loss

transformers = pytest.importorskip("transformers")
ROOTS = {
    "warm": ["sun", "beach", "summer", "fire"],
    "cold": ["snow", "ice", "winter", "frost"],
    "wet": ["rain", "river", "fog", "sea"],
}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "texts.jsonl"
    lines = []
    for i in range(90):
        kind = list(ROOTS)[i % 3]
        words = ["the", *rng.choice(ROOTS[kind], rng.integers(1, 5)), "was", "here"]
        lines.append(json.dumps({"text": " ".join(words), "kind": kind, "writer": f"w{i % 9}", "year": 2000 + i % 10}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_texts_of_a_class_are_forgotten(reviews: Path) -> None:
    tokenizer = word_tokenizer(["the was here", *(" ".join(words) for words in ROOTS.values())])
    data = expunge.read_table(reviews, text="text", target="kind", subject="writer", tokenizer=tokenizer)
    assert data.classes == ("cold", "warm", "wet")
    assert (data.inputs < 0).any()
    assert data.select(where="year < 2002 and target == 'wet'").tolist() == [i for i in range(90) if i % 10 < 2 and i % 3 == 2]
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            num_labels=3, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    adapter = ClassifierAdapter(model, data.classes)
    batch = adapter.collate([adapter.encode(r) for r in data.rows()])
    assert batch.tensors["attention_mask"].sum(1).tolist() == (data.inputs >= 0).sum(1).tolist()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        class_loss(adapter.scores(model, dict(batch.tensors)), batch.targets).mean().backward()
        optimizer.step()

    def accuracy(chosen: np.ndarray) -> float:
        with torch.no_grad():
            return float((adapter.scores(model, dict(batch.tensors)).argmax(1).numpy() == data.targets)[chosen].mean())

    wet = data.targets == 2
    assert min(accuracy(wet), accuracy(~wet)) > 0.95
    expunge.unlearn_rows(
        model, data, classes=["wet"], method="graddiff", schedule="fixed", schedule__lr=1e-3, schedule__steps=40,
    )  # fmt: skip
    assert accuracy(wet) < 0.5
    assert accuracy(~wet) > 0.9
