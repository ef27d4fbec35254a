"""Every method that reads what an encoder-decoder offers runs on one, and forgetting there is forgetting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.methods.test_methods_run import FORGET, QUIET, RETAIN, encoded, facts, losses

from expunge.adapters.pairs import PairAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.projection import installed
from expunge.adapters.words import word_tokenizer
from expunge.api import audit_model
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.refusals import REFUSALS
from expunge.engine.edit import apply_edit
from expunge.engine.loop import train
from expunge.methods.catalogue import serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS


@pytest.fixture(scope="module")
def target() -> PairAdapter:
    """A tiny T5 that knows 24 facts by heart."""
    tokenizer = word_tokenizer([r.prompt + " " + r.answer for r in facts()] + list(REFUSALS))
    adapter = PairAdapter(preset("t5-tiny", tokenizer), tokenizer)
    recipe = build("finetune", {"schedule": {"name": "fixed", "lr": 5e-3, "steps": 120, "batch": 24, "warmup": 0.1}})
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in facts()]}, QUIET)
    assert losses(adapter, facts()) < 0.1
    return adapter


def run(adapter: PairAdapter, name: str, **overrides: Any) -> Any:
    recipe = build(name, overrides)
    oracle = {Of.ORACLE: adapter.copy()} if Of.ORACLE in recipe.models(adapter.layers()) else {}
    for held in oracle.values():
        held.model = preset("t5-tiny", adapter.tokenizer, seed=1)
    return train(adapter, recipe, encoded(adapter, recipe), QUIET, models=oracle)


RUNNING = [n for n in METHODS.names() if serves(n, PairAdapter.offers)[0]]


@pytest.mark.parametrize("name", RUNNING)
def test_every_method_runs_through_the_engine_and_moves_the_model(target, name) -> None:
    adapter = target.copy()
    before = copy.deepcopy(adapter.model.state_dict())
    overrides: dict[str, Any] = {"finish": {"scale": 1.0}} if build(name).finish is not None else {}
    outcome = run(adapter, name, schedule={"name": "fixed", "lr": 1e-3, "steps": 2, "batch": 6, "warmup": 0}, **overrides)
    assert outcome.steps == 2
    after = outcome.model.state_dict()
    if installed(outcome.model):  # the weights stay, and directions are gone
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert losses(adapter, facts()) != losses(target, facts())
    else:
        assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


@pytest.mark.parametrize("name", [n for n in EDITS.names() if EDITS.get(n).offers <= PairAdapter.offers])
def test_every_edit_runs(target, name) -> None:
    adapter = target.copy()
    apply_edit(adapter, EDITS.get(name)(), encoded(adapter, build("npo")), QUIET)
    assert all(torch.isfinite(p).all() for p in adapter.model.parameters())


@pytest.mark.parametrize(("name", "lr", "steps"), [("npo", 3e-5, 60), ("graddiff", 5e-4, 30), ("simnpo", 1e-3, 30)])
def test_some_steps_forget_and_keep(target, name, lr, steps) -> None:
    adapter = target.copy()
    run(adapter, name, schedule={"name": "fixed", "lr": lr, "steps": steps, "batch": 6, "warmup": 0.1, "decay": "constant"})
    assert losses(adapter, FORGET) > losses(target, FORGET) + 0.5
    assert losses(adapter, RETAIN) < 0.5


def test_answers_are_known_before_and_not_after(target) -> None:
    def right(adapter: PairAdapter, records: list[Record]) -> float:
        said = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 12)
        return sum(g.text == r.answer and g.ended for g, r in zip(said, records, strict=True)) / len(records)

    assert right(target, facts()) > 0.9
    adapter = target.copy()
    run(adapter, "graddiff", schedule={"name": "fixed", "lr": 1e-3, "steps": 30, "batch": 6, "warmup": 0.1})
    assert right(adapter, FORGET) < 0.4
    assert right(adapter, RETAIN) > 0.6


def test_rmu_moves_the_decoder_only(target) -> None:
    adapter = target.copy()
    before = copy.deepcopy(adapter.model.state_dict())
    outcome = run(adapter, "rmu", schedule={"name": "fixed", "lr": 4e-3, "steps": 5, "batch": 6, "warmup": 0})
    moved = [k for k, v in outcome.model.state_dict().items() if not torch.equal(before[k], v)]
    assert moved
    assert all(k.startswith("decoder.block.") and "DenseReluDense.wo" in k for k in moved)


def test_lora_and_the_reference_without_it(target) -> None:
    adapter = target.copy()
    outcome = run(
        adapter, "npo", retain="kl", parameters={"name": "lora", "rank": 4}, reference="adapter-off",
        schedule={"name": "fixed", "lr": 1e-2, "steps": 10, "batch": 6, "warmup": 0},
    )  # fmt: skip
    adapter.model = outcome.model
    assert losses(adapter, FORGET) > losses(target, FORGET) + 0.3


def test_plain_text_is_refused_with_the_reason(target) -> None:
    with pytest.raises(InputError, match="plain text, and an encoder-decoder has no prompt"):
        target.encode(Record("book", "A long text without a prompt."))


def test_an_audit_with_its_attacks_runs_from_python(target) -> None:
    unlearned, retrained = target.copy(), PairAdapter(preset("t5-tiny", target.tokenizer, seed=3), target.tokenizer)
    run(unlearned, "graddiff", schedule={"name": "fixed", "lr": 5e-4, "steps": 20, "batch": 6, "warmup": 0.1})
    recipe = build("finetune", {"schedule": {"name": "fixed", "lr": 5e-3, "steps": 60, "batch": 24, "warmup": 0.1}})
    train(retrained, recipe, {Stream.RETAIN: [retrained.encode(r) for r in RETAIN]}, QUIET)
    document = audit_model(
        target.model, unlearned.model, target.tokenizer, FORGET, RETAIN, retrained=[retrained.model], draws=200
    )
    assert document.modality == "encoder-decoder"
    before, after = document.models[0].numbers, document.models[-1].numbers
    assert after["forget.loss"].value > before["forget.loss"].value + 1
    assert {"quantised.8-bit.loss", "relearn.recovered"} <= set(after)
    assert document.models[-1].judgement is not None
