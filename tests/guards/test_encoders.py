"""Sentence encoders in the layout of sentence-transformers, made here and loaded from their folder; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import socket

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

import huggingface_hub
import sentence_transformers as package

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.detectors.classifier import Classifier
from expunge.guards.detectors.similar import Similar
from expunge.guards.encoders import Sentences
from expunge.guards.guarded import guard_model
from expunge.guards.policy import Row
from expunge.guards.request import targets_of
from tests.guards.conftest import KEY
from tests.guards.test_scoring import FRESH, ORDINARY, QUICK, TARGETS, fired, material

SHORT = Sampling(max_tokens=16)
TEXTS = [FRESH[0], "A much longer text, so that the others are padded, and the padding must not count at all.", FRESH[1]]


@pytest.fixture(scope="module")
def sentences(bert, tmp_path_factory):
    """A BERT of two blocks whose first state stands for a text, with a dense layer behind it, as the package saves it."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    made = package.SentenceTransformer(
        modules=[Transformer(str(bert), max_seq_length=64), Pooling(64, pooling_mode="cls"), Dense(64, 48)], device="cpu"
    )
    folder = tmp_path_factory.mktemp("sentences") / "model"
    made.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Every connection is an error."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_folder_is_loaded_with_its_own_pooling_and_without_the_network(sentences, bert, no_network):
    found = Sentences(str(sentences)).encode(TEXTS).toarray()
    assert found.shape == (3, 48)
    again = package.SentenceTransformer(str(sentences), device="cpu", local_files_only=True)
    assert np.allclose(found, again.encode(TEXTS, normalize_embeddings=True), atol=1e-6)
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    dense = again[2]
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
            vector = dense.activation_function(dense.linear(state)).numpy()
        assert np.allclose(row, vector / np.linalg.norm(vector), atol=1e-5)


def test_likeness_and_forbidden_terms_go_by_it(sentences, target_adapter, people, no_network):
    watcher = Similar(rate=0.05, encoder=str(sentences)).fit(material())
    assert watcher.encoder._whole is not None
    assert fired(watcher, TARGETS[2].questions[4])[0] == "t2"
    assert np.mean([bool(fired(watcher, q)) for q in FRESH]) <= watcher.bound.upper(0.999)
    watcher.drop("t2")
    assert "t2" not in fired(watcher, TARGETS[2].questions[4])
    targets = targets_of(people.split.forget, people.split.retain)
    row = Row(detector="always", action={"name": "bar", "encoder": str(sentences), "alpha": 5.0, "delta": 0.0, "candidates": 8})
    made = guard_model(target_adapter, guards=[row], targets=targets, key=KEY)
    edit = made.policy.open(Conversation.of(people.split.forget[0].prompt)).scores[0].edit
    assert edit.encoder._whole is not None
    terms = np.concatenate([a.terms.toarray() for a in made.policy._rows[0].doer._held.answers if a.label in edit.labels])
    assert terms.shape[1] == 48
    asked = [r.prompt for r in people.split.forget[:3]]
    bare = guard_model(target_adapter, guards="filter", targets=[], key=KEY).answers(asked, SHORT, scores=True)
    barred = made.answers(asked, SHORT, scores=True)
    assert [a.log_probabilities for a in barred] != [a.log_probabilities for a in bare]


def test_a_plain_encoder_and_a_classifier_are_read_from_their_folder_alone(bert, no_network):
    assert Sentences(str(bert)).encode(TEXTS).shape == (3, 64)
    given = material(targets=TARGETS[:2], ordinary=ORDINARY[:60])
    watcher = Classifier(rate=0.1, model=str(bert), tuning={**QUICK, "epochs": 8}).fit(given)
    assert np.mean([bool(fired(watcher, q)) for t in TARGETS[:2] for q in t.questions]) > 0.6


@pytest.fixture
def copied(sentences, tmp_path):
    shutil.copytree(sentences, tmp_path / "copy")
    return tmp_path / "copy"


def test_pickled_weights_are_refused(copied, bert, tmp_path):
    for place, label in ((copied, "the transformer"), (copied / "2_Dense", "a part")):
        held = place / "model.safetensors"
        assert held.is_file(), label
        held.rename(place / "kept")
        torch.save({}, place / "pytorch_model.bin")
        with pytest.raises(InputError, match="pickled weights only"):
            Sentences(str(copied))
        (place / "pytorch_model.bin").unlink()
        (place / "kept").rename(held)
    assert Sentences(str(copied)).encode(TEXTS[:1]).shape == (1, 48)
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights only"):
        Sentences(str(tmp_path / "bert"))
    with pytest.raises(InputError, match="pickled weights only"):
        Classifier(rate=0.05, model=str(tmp_path / "bert"), tuning=QUICK).fit(material())


def test_code_that_comes_with_a_model_is_not_run(copied):
    parts = json.loads((copied / "modules.json").read_text())
    parts[1]["type"] = "own_code.Pooling"
    (copied / "modules.json").write_text(json.dumps(parts))
    (copied / "own_code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(InputError, match=r"brings its own code \(own_code.Pooling\)"):
        Sentences(str(copied))
    for damaged in ("{", "[]", '[{"type": 1}]'):
        (copied / "modules.json").write_text(damaged)
        with pytest.raises(InputError, match=r"modules\.json"):
            Sentences(str(copied))


def test_a_name_that_cannot_be_reached_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    name = "sentence-transformers/no-such-model"
    with pytest.raises(InputError, match=f"There is no sentence encoder '{name}': .* hub") as found:
        Sentences(name)
    assert "\n" not in found.value.message
    assert "give the folder" in found.value.remedy
    with pytest.raises(InputError, match=r"There is no classifier 'no-such/classifier': .* hub"):
        Classifier(rate=0.05, model="no-such/classifier").fit(material())
    with pytest.raises(InputError, match="There is no model folder"):
        Sentences(str(tmp_path / "gone"))
