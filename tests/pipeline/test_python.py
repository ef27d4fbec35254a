"""The same from Python, on models that the caller holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import expunge
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.core.errors import InputError
from tests.command import rows
from tests.world import World

GPT2 = "gpt2-tiny"


def table(records) -> list[dict[str, object]]:
    """Records as the dicts that a user would hold."""
    return [
        {"id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject, "perturbed_answer": list(r.perturbed)}
        for r in records
    ]


@pytest.fixture(params=["llama-tiny", GPT2])
def held(request: pytest.FixtureRequest, trained_models: Path, people_world: World) -> World:
    return people_world if request.param == "llama-tiny" else World(trained_models, preset=GPT2, persons=12)


def test_unlearn_and_audit_in_memory(held: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five lines of Python: the model forgets, the rest stays, and the document says how far; nothing is written."""
    monkeypatch.chdir(tmp_path)
    split, tokenizer = held.split, held.tokenizer
    target = held.target().model
    model = copy.deepcopy(target)
    sets = {"forget": table(split.forget), "retain": table(split.retain), "holdout": table(split.holdout)}
    seen: list[int] = []
    done = expunge.unlearn(model, tokenizer, **sets, method="npo", seed=3, progress=lambda done, total, text: seen.append(done))
    assert done.reached, done.sentence
    assert done.model is model  # changed in place
    assert seen
    before, after = LanguageAdapter(target, tokenizer), LanguageAdapter(model, tokenizer)
    assert held.loss(after, split.forget) > held.loss(before, split.forget) + 1
    assert held.loss(after, split.retain) < held.loss(before, split.retain) + 0.3
    document = expunge.audit_model(
        target, done.model, tokenizer, **sets, retrained=[held.retrained().model],
        metrics=("loss", "probability"), relearn=None, quantise=(), draws=200,
    )  # fmt: skip
    assert [m.role for m in document.models] == ["target", "retrained", "unlearned"]
    verdicts = [m.judgement.verdict for m in document.models if m.judgement]
    assert verdicts[0] == "not forgotten"
    assert not list(tmp_path.iterdir())


def test_the_models_own_dropout_is_there_if_asked_for(people_world: World) -> None:
    """Two steps from one start: the same without dropout whatever the model's own, other weights with it."""
    split, tokenizer = people_world.split, people_world.tokenizer
    found = []
    for asked, own in ((False, 0.0), (False, 0.5), (True, 0.5)):
        model = build(GPT2, tokenizer, seed=0, resid_pdrop=own, embd_pdrop=own, attn_pdrop=own)
        expunge.unlearn(
            model, tokenizer, forget=table(split.forget)[:4], retain=table(split.retain)[:8], method="graddiff",
            schedule={"name": "fixed", "steps": 2, "lr": 1e-3}, engine__dropout=asked,
        )  # fmt: skip
        found.append(model.transformer.h[0].mlp.c_fc.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-5)


def test_lora_wraps_the_model(people_world: World) -> None:
    target = people_world.target().model
    weights = {n: p.detach().clone() for n, p in target.named_parameters()}
    done = expunge.unlearn(
        target, people_world.tokenizer, table(people_world.split.forget), table(people_world.split.retain),
        parts={"retain": "kl", "parameters": "lora"}, gradient="project",
        schedule__name="fixed", schedule__lr=1e-3, schedule__epochs=1,
    )  # fmt: skip
    names = {n for n, p in done.model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora" in n for n in names)
    base = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in done.model.named_parameters()}
    assert all(torch.equal(base[n], w) for n, w in weights.items())


def test_recipe_is_that_of_the_command_line(people_world: World) -> None:
    """Keywords with double underscores, nested mappings and dotted words are one recipe."""
    one = expunge.build_recipe("npo", {"retain": "kl", "parameters": {"name": "lora", "rank": 4}, "schedule": {"epochs": 3}})
    two = expunge.build_recipe("npo", {"retain": "kl", "parameters": "lora", "parameters.rank": 4, "schedule.epochs": 3})
    assert one.spec() == two.spec()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "npoo"}, "'npo'"),
        ({"betta": 1}, "'beta'"),
        ({"beta": -1}, r"\(0, inf\)"),
        ({"retain": 5}, "retain"),
        ({"parts": {"retain": "klx"}}, "'kl'"),
        ({"parts": {"beta": 0.1}, "parts__x": 1}, "parts"),
        ({"forget": []}, "no records"),
        ({"forget": [{"q": "a", "a": "b"}]}, "'q', 'a'"),
        ({"forget": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"forget": rows("rest")[:3]}, "3 retain records|duplicate"),
        ({"engine__seeed": 1}, "'seed'"),
        ({"alternatives": "some"}, "some"),
        ({"template": "no places"}, "{answer}"),
        ({"method": "retrain"}, "base"),
        ({"holdout": 3}, "holdout"),
    ],
)
def test_wrong_input_is_an_input_error(people_world: World, change: dict[str, object], says: str) -> None:
    target = people_world.target()
    before = target.fingerprint()
    given = {"forget": table(people_world.split.forget), "retain": rows("rest"), "allow_large_forget": True, **change}
    with pytest.raises(InputError, match=says):
        expunge.unlearn(target.model, people_world.tokenizer, **given)
    assert target.fingerprint() == before


def test_what_is_no_model(people_world: World) -> None:
    records, kept = table(people_world.split.forget), table(people_world.split.retain)
    model, tokenizer = people_world.target().model, people_world.tokenizer
    for wrong in ((torch.nn.Linear(2, 2), tokenizer), (model, "tokenizer"), (3, None)):
        with pytest.raises(InputError):
            expunge.unlearn(*wrong, records, kept)
        with pytest.raises(InputError):
            expunge.audit_model(model, *wrong, records, kept)
    with pytest.raises(InputError, match="'loss'"):
        expunge.audit_model(model, model, tokenizer, records, metrics=("los",))
