"""Transformers classifiers of images and texts with rows from files: what the model's own files say is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.command import Run, refused

TRAINING = ["training.steps=40", "training.batch=12", "training.lr=0.01"]
FEW = ["--method", "finetune", "schedule={name: fixed, lr: 0.0001, steps: 2, batch: 8, warmup: 0}"]
WORDS = {
    "good": ["fine", "lovely", "great", "warm"],
    "bad": ["awful", "cold", "broken", "sour"],
    "dull": ["plain", "slow", "grey", "flat"],
}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Untrained, of 16 x 16 pixels and three classes, beside two folders of coloured pictures."""
    from transformers import ViTConfig, ViTForImageClassification

    names = ["blue", "green", "red"]
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    how = {
        "size": {"height": 16, "width": 16},
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(how))
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 12), ("unseen", 24)):
        for channel, name in enumerate(reversed(names)):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 130
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """Untrained, with a tokenizer of a dozen words, beside two tables of sentences."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    (tmp_path / "bert").mkdir()
    words = [w for several in WORDS.values() for w in several]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=12).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label=dict(enumerate(WORDS)), label2id={n: i for i, n in enumerate(WORDS)},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    for name, seed in (("train.csv", 0), ("unseen.csv", 1)):
        rng = np.random.default_rng(seed)
        rows = [f"it was {' '.join(rng.permutation(WORDS[k])[:3])},{k}" for k in WORDS for _ in range(15)]
        (tmp_path / name).write_text("review,feeling\n" + "\n".join(rows) + "\n")
    return tmp_path


PHOTOS = ["--data", "photos", "--holdout", "unseen"]
REVIEWS = ["--data", "train.csv", "--holdout", "unseen.csv", "reading.text=review", "reading.target=feeling"]


@pytest.mark.usefixtures("vit")
def test_images(expunge: Run, tmp_path: Path) -> None:
    done = expunge("unlearn", "vit", *PHOTOS, "--class", "green", *FEW, *TRAINING, "--out", "out", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]["forget"]["rows"] == 12
    audited(expunge, tmp_path)


@pytest.mark.usefixtures("bert")
def test_texts(expunge: Run, tmp_path: Path) -> None:
    done = expunge("unlearn", "bert", *REVIEWS, "--class", "bad", *FEW, *TRAINING, "--allow-overlap", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]["forget"]["rows"] == 15
    audited(expunge, tmp_path)


def audited(expunge: Run, folder: Path) -> None:
    """One model is retrained by the settings of the run, and everyone is judged."""
    done = expunge("audit", "out", "--retrain", 1, "budget=50")
    assert done.code == 0, done.err
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert [m["role"] for m in held["models"]] == ["target", "retrained", "unlearned"]


@pytest.mark.usefixtures("vit")
def test_pictures_are_read_as_the_model_says(tmp_path: Path) -> None:
    from expunge.pipeline.problems import load_problem

    held = load_problem(str(tmp_path / "vit"), data=str(tmp_path / "photos"))
    assert held.data.inputs.shape == (36, 3, 16, 16)
    assert held.data.classes == ("blue", "green", "red")
    red = held.data.inputs[held.data.select(classes=["red"])].mean(axis=(0, 2, 3))
    bright, dark = 189.5 / 255, 59.5 / 255
    assert red == pytest.approx([(bright - 0.5) / 0.5, (dark - 0.4) / 0.25, (dark - 0.3) / 0.2], abs=0.05)


@pytest.mark.usefixtures("bert")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--class", "bad"], ["no rows are given", "--data FILE"]),
        ([*REVIEWS, "--class", "awful"], ["no class 'awful'"]),
        (["--data", "tain.csv", "reading.text=review", "--class", "bad"], ["tain.csv"]),
        (["--data", "train.csv", "reading.text=revew", "reading.target=feeling", "--class", "bad"], ["'revew'", "review"]),
        (["--data", "train.csv", "reading.txt=review", "--class", "bad"], ["'txt'", "text"]),
        (["--data", "wrong.csv", "reading.text=review", "reading.target=feeling", "--class", "bad"], ["'terrible'"]),
        ([*REVIEWS, "--class", "bad", "training.steps=10"], ["'batch'"]),
        ([*REVIEWS, "--class", "bad", "training=40"], ["training"]),
    ],
)
def test_bad_input(expunge: Run, tmp_path: Path, words: list[object], says: list[str]) -> None:
    (tmp_path / "wrong.csv").write_text((tmp_path / "train.csv").read_text().replace(",bad", ",terrible"))
    refused(expunge("unlearn", "bert", *words, "--method", "ssd", "--out", "out"), *says)
    assert not (tmp_path / "out").exists()
