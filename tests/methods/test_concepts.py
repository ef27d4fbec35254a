"""Concepts of digits, the poison made from them, and what it does to the class that they carry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy, encoded

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.concepts import carrying, class_similarity, concept_weights, learn_concepts
from expunge.engine.loop import train
from expunge.engine.preparation import run_preparation
from expunge.methods.alternatives import other_classes
from expunge.methods.preparations.poison import ConceptPoison
from expunge.methods.recipe import build

EIGHT = 8
#: which digits show a feature of writing; "ink" is of the row
SHOWN = {
    "loop above": (8, 9), "loop below": (6, 8), "loop": (0, 6, 8, 9), "bar above": (5, 7), "bar below": (2,),
    "stem": (1, 4, 7, 9), "open to the left": (2, 3, 5, 7),
}  # fmt: skip
NAMES = (*SHOWN, "ink")
FIXED = {"name": "fixed", "lr": 1e-3, "steps": 100, "batch": 50, "retain_batch": 150, "warmup": 0, "weight_decay": 0}


def shown(table) -> np.ndarray:
    by_class = np.array([[c in digits for digits in SHOWN.values()] for c in range(10)])
    ink = table.inputs.sum(axis=1) > np.median(table.inputs.sum(axis=1))
    return np.concatenate([by_class[table.targets], ink[:, None]], axis=1)


@pytest.fixture
def labelled(digits, tmp_path) -> str:
    """Concepts of the first 400 training rows."""
    held = digits.tables[0]
    np.savez(tmp_path / "concepts.npz", ids=np.array(held.ids[:400]), concepts=shown(held)[:400], names=np.array(NAMES))
    return str(tmp_path / "concepts.npz")


def sides(digits, which: int = 0):
    held = digits.tables[which]
    chosen = held.select(classes=[str(EIGHT)])
    return held.rows(chosen, "forget"), held.rows(held.others(chosen), "retain")


def streams(digits, adapter) -> dict[Stream, list]:
    forget, retain = sides(digits)
    return {Stream.FORGET: encoded(adapter, forget), Stream.RETAIN: encoded(adapter, retain)}


def features(digits, adapter) -> np.ndarray:
    batch = adapter.collate(encoded(adapter, digits.tables[0].rows()))
    layer = adapter.layers()[-1]
    with torch.no_grad():
        return adapter.forward(adapter.model, batch, frozenset({f"features:{layer}"})).features(layer).numpy()


def test_detectors_see_the_concept_and_measure_a_distance() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 5))
    labels = np.stack([states[:, 0] > 0.5, states[:, 1] + states[:, 2] < 0], axis=1)
    bank = learn_concepts(states, labels, ("a", "b"), samples=100, c=10)
    np.testing.assert_allclose(np.linalg.norm(bank.directions, axis=1), 1)
    fresh = rng.normal(size=(500, 5))
    scores = bank.scores(fresh)
    np.testing.assert_allclose(scores[:, 0], fresh[:, 0] - 0.5, atol=0.4)
    np.testing.assert_allclose(scores[:, 1], -(fresh[:, 1] + fresh[:, 2]) / 2**0.5, atol=0.4)
    with pytest.raises(InputError, match="'b' is shown by 0 of 400"):
        learn_concepts(states, labels & [True, False], ("a", "b"))


def test_weights_say_what_speaks_for_a_class() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 900)
    scores = rng.normal(size=(900, 4))
    scores[:, 0] += 3 * (classes == 0)
    scores[:, 1] += 3 * (classes != 2)  # speaks for two classes alike, so it carries neither of them alone
    weights = concept_weights(scores, classes, 4)
    assert weights.shape == (4, 4)
    assert np.argmax(weights[0]) == 0
    assert carrying(weights, 0, 1) == [0]
    assert 1 not in carrying(weights, 2, 4)
    assert not weights[3].any()
    two = concept_weights(scores, np.minimum(classes, 1), 2)
    np.testing.assert_allclose(two[0], -two[1])
    alike = class_similarity(scores, classes, 4)
    assert alike[0, 1] > alike[0, 2] + 0.2
    assert np.isnan(alike[3]).all()
    with pytest.raises(InputError, match="all rows are of one"):
        concept_weights(scores, np.zeros(900, dtype=np.int64), 4)


def test_poison_is_made_of_the_rows_that_show_what_carries_the_class(digits, labelled) -> None:
    adapter = digits.target()
    given = streams(digits, adapter)
    found = run_preparation(ConceptPoison(file=labelled), adapter, given, QUIET, scratch=None)
    kept, made = found.examples[Stream.FORGET], found.examples[Stream.ALTERNATIVE]
    assert 0.5 * len(given[Stream.FORGET]) < len(kept) <= len(given[Stream.FORGET])
    assert [e.id + "#poison" for e in kept] == [e.id for e in made]
    assert all(np.array_equal(a.data[0], b.data[0]) for a, b in zip(kept, made, strict=True))
    assert EIGHT not in {e.data[1] for e in made}
    assert len({e.data[1] for e in made}) > 5
    assert "loop" in found.notes[0]
    assert "ink" not in found.notes[0]
    bank = learn_concepts(features(digits, adapter)[:400], shown(digits.tables[0])[:400].astype(bool), NAMES)
    assert bank.names == NAMES
    for label, few in (("similar", {0, 6, 9}), ("dissimilar", {1, 2, 3, 4, 5, 7})):
        part = ConceptPoison(file=labelled, label=label)
        targets = {e.data[1] for e in run_preparation(part, adapter, given, QUIET, scratch=None).examples[Stream.ALTERNATIVE]}
        assert len(targets) == 1
        assert targets <= few, (label, targets)
    chance = run_preparation(ConceptPoison(file=labelled, rows="random", top=1), adapter, given, QUIET, scratch=None)
    concepts = run_preparation(ConceptPoison(file=labelled, top=1), adapter, given, QUIET, scratch=None)
    assert len(chance.examples[Stream.FORGET]) == len(concepts.examples[Stream.FORGET])


def test_with_all_rows_and_random_labels_it_is_random_label(digits) -> None:
    found = []
    for name in ("concept-poison", "random-label"):
        adapter = digits.target()
        given = streams(digits, adapter)
        more = {"preparation": {"rows": "all"}} if name == "concept-poison" else {}
        if name == "random-label":
            rows = sides(digits)[0]
            pairs = zip(rows, other_classes(rows, 10, "other"), strict=True)
            given[Stream.ALTERNATIVE] = [adapter.encode(r, answer=c, suffix="#other") for r, c in pairs]
        train(adapter, build(name, {"schedule": {**FIXED, "steps": 5}, **more}), given, QUIET)
        found.append(adapter.model.state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.parametrize("label", ["random", "similar"])
def test_the_class_is_gone_and_its_concepts_speak_for_it_no_more(digits, labelled, label) -> None:
    adapter = digits.target()
    (forget, _), (unseen, kept) = sides(digits), sides(digits, 1)
    before = accuracy(adapter, kept)
    assert accuracy(adapter, forget) > 0.95

    def share() -> float:
        """How large the weights of the class are among those of all, from the classes that the network itself sees."""
        states = features(digits, adapter)
        bank = learn_concepts(states, shown(digits.tables[0]).astype(bool), NAMES)
        batch = adapter.collate(encoded(adapter, digits.tables[0].rows()))
        with torch.no_grad():
            seen = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.argmax(1).numpy()
        norms = np.linalg.norm(concept_weights(bank.scores(states), seen, 10), axis=1)
        return float(norms[EIGHT] / norms.mean())

    first = share()
    train(adapter, build("concept-poison", {"schedule": FIXED, "preparation": {"file": labelled, "label": label}}),
          streams(digits, adapter), QUIET)  # fmt: skip
    assert accuracy(adapter, forget) < 0.1
    assert accuracy(adapter, unseen) < 0.15
    assert accuracy(adapter, kept) > before - 0.05
    assert share() < 0.7 * first


def test_what_does_not_fit_is_refused(digits, labelled, tmp_path) -> None:
    adapter = digits.target()
    given = streams(digits, adapter)

    def refused(said: str, **part) -> None:
        with pytest.raises(InputError, match=said):
            run_preparation(ConceptPoison(**part), adapter, given, QUIET, scratch=None)

    refused("Nothing says which rows show which concepts")
    refused("holds no concepts", file=str(tmp_path / "none.npz"))
    held = dict(np.load(labelled))
    for change, said in (
        ({"ids": np.array(["nobody", *held["ids"][1:]])}, "such as 'nobody'"),
        ({"concepts": held["concepts"][:, :2]}, "labels"),
        ({"concepts": np.where(held["concepts"], 2, 0)}, "Give 0 or 1"),
        ({"concepts": held["concepts"][:, 4:5], "names": held["names"][4:5]}, "No concept speaks for class 8"),
    ):
        np.savez(tmp_path / "other.npz", **{**held, **change})
        refused(said, file=str(tmp_path / "other.npz"))
