"""Methods on a small model that has memorised something, through the real engine."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from expunge.adapters.added import with_tokens
from expunge.adapters.composite import Composite
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.projection import installed
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Of, Stream
from expunge.data.records import Record, RecordSet
from expunge.data.spans import Spans
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.methods.alternatives import alternatives, kind_for
from expunge.methods.alternatives import encoded as alternatives_of
from expunge.methods.catalogue import serves
from expunge.methods.evaluate import loss_on
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
TOWNS = ("Arles", "Bath", "Cork", "Delft", "Essen", "Faro", "Graz", "Hull", "Ivry", "Jena", "Kiel", "Lund")
TRADES = ("baker", "cooper", "diver", "editor", "farmer", "glazier", "hatter", "miner", "nurse", "painter", "rider", "sailor")


def facts() -> list[Record]:
    made = []
    for i, name in enumerate(NAMES):
        made.append(Record(f"t{i}", f"{name} lives in {TOWNS[i]}.", f"Where does {name} live?", subject=name))
        made.append(Record(f"w{i}", f"{name} is a {TRADES[(5 * i) % 12]}.", f"What is {name}?", subject=name))
    return list(Spans(terms=(*TOWNS, *TRADES)).mark(RecordSet("facts", tuple(made))))


FORGET, RETAIN = facts()[:6], facts()[6:]
QUIET = Engine(checkpoint_every=0)


def encoded(adapter: LanguageAdapter, recipe) -> dict[Stream, list]:
    if recipe.preparation is not None and recipe.preparation.added_tokens:
        forget, retain = recipe.preparation.rewritten(FORGET, RETAIN, 0)
        return {s: [adapter.encode(r) for r in held] for s, held in ((Stream.FORGET, forget), (Stream.RETAIN, retain))}
    found = {Stream.RETAIN: [adapter.encode(r) for r in RETAIN]}
    if recipe.forget or Stream.FORGET in recipe.streams(adapter.layers()):
        found[Stream.VALIDATION] = [adapter.encode(r) for r in RETAIN[:4]]
        found[Stream.FORGET] = [adapter.encode(r) for r in FORGET]
    if Stream.ALTERNATIVE in recipe.streams(adapter.layers()):
        found[Stream.ALTERNATIVE] = alternatives_of(adapter, FORGET, recipe, "auto")
    return found


def run(adapter: LanguageAdapter, name: str, **overrides):
    recipe = build(name, overrides)
    if recipe.preparation is not None and recipe.preparation.added_tokens:
        adapter = with_tokens(adapter, recipe.preparation.added_tokens)
    oracle = {Of.ORACLE: adapter.copy()} if Of.ORACLE in recipe.models(adapter.layers()) else {}
    for held in oracle.values():
        held.model = preset("llama-tiny", adapter.tokenizer, seed=1, num_hidden_layers=4)
    return train(adapter, recipe, encoded(adapter, recipe), QUIET, models=oracle)


def losses(adapter: LanguageAdapter, records: list[Record]) -> float:
    found = mean_losses(adapter, adapter.model, [adapter.encode(r) for r in records], 4096)
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def target() -> LanguageAdapter:
    from expunge.data.refusals import REFUSALS

    texts = [r.prompt + " " + r.answer for r in facts()] + list(REFUSALS) + ["Question: Answer:"]
    tokenizer = word_tokenizer(texts)
    adapter = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0, num_hidden_layers=4), tokenizer)
    recipe = build("finetune", {"schedule": {"name": "fixed", "lr": 5e-3, "steps": 160, "batch": 24, "warmup": 0.1}})
    train(adapter, recipe, {Stream.RETAIN: [adapter.encode(r) for r in facts()]}, QUIET)
    assert losses(adapter, facts()) < 0.1
    return adapter


FORGETTING = [
    "altpo",
    "ceu",
    "dpo",
    "flat",
    "gradascent",
    "graddiff",
    "graddiff-kl",
    "idkdpo",
    "loku",
    "npo",
    "pdu",
    "satimp",
    "simnpo",
    "undial",
    "wga",
]


@pytest.mark.parametrize("name", FORGETTING)
def test_a_small_step_down_the_forget_gradient_raises_the_forget_loss(target, name):
    adapter = target.copy()
    recipe = build(name)
    recipe = recipe.model_copy(update={"retain": (), "balance": build("npo").balance})
    answers = alternatives(FORGET, kind_for(name, "auto", FORGET))
    loss = loss_on(recipe, adapter, target, FORGET, alternatives=answers)["total"]
    parameters = list(adapter.model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > 0
    before = losses(adapter, FORGET)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(1e-2 * gradient / norm)
    assert losses(adapter, FORGET) > before


@pytest.mark.parametrize("name", [n for n in METHODS.names() if serves(n, LanguageAdapter.offers)[0]])
def test_every_method_runs_through_the_engine_and_moves_the_model(target, name, tmp_path):
    adapter = target.copy()
    before = copy.deepcopy(adapter.model.state_dict())
    overrides = {"finish": {"scale": 1.0}} if build(name).finish is not None else {}
    if METHODS.get(name).build().parameters.factors:
        overrides |= {"parameters": {"rank": 4}}
    if "discovery" in (build(name).preparation.makes if build(name).preparation else ()):  # the town of the first is made up
        (tmp_path / "towns.txt").write_text("\n".join(TOWNS[1:]))
        how = {"known": str(tmp_path / "towns.txt"), "pattern": r"lives in (\w+)", "samples": 2, "tokens": 12}
        overrides |= {"preparation": how}
    outcome = run(adapter, name, schedule={"name": "fixed", "lr": 1e-3, "steps": 2, "batch": 6, "warmup": 0}, **overrides)
    assert outcome.steps == 2
    merge = getattr(outcome.model, "merge_and_unload", None)
    if isinstance(outcome.model, Composite):  # the target stays, and another model speaks
        after = outcome.model.state_dict()
        assert all(torch.equal(before[k], after["target." + k]) for k in before)
        held, adapter.model = losses(adapter, facts()), outcome.model
        assert losses(adapter, facts()) != held
    elif installed(outcome.model):  # the weights stay, and directions are gone
        after = outcome.model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert losses(adapter, facts()) != losses(target, facts())
    else:
        after = (merge() if merge else outcome.model).state_dict()
        assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values())


RATES = {
    "npo": 6e-5,
    "simnpo": 1e-3,
    "graddiff": 5e-4,
    "satimp": 5e-3,
    "wga": 1e-3,
    "idkdpo": 3e-4,
    "pdu": 3e-4,
    "task-vector": 1e-3,
}


@pytest.mark.parametrize("name", RATES)
def test_some_steps_forget_and_with_a_retain_term_keep(target, name):
    adapter = target.copy()
    overrides = {"finish": {"scale": 4.0}} if name == "task-vector" else {}
    schedule = {"name": "fixed", "lr": RATES[name], "steps": 30, "batch": 6, "warmup": 0.1, "decay": "constant"}
    run(adapter, name, schedule=schedule, **overrides)
    assert losses(adapter, FORGET) > losses(target, FORGET) + 0.5
    if name != "task-vector":
        assert losses(adapter, RETAIN) < 0.5


def test_ascent_under_two_names_trains_the_same_weights(target):
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 3, "batch": 4, "warmup": 0}
    ends = []
    for name, overrides in (
        ("gradascent", {}),
        ("wga", {"beta": 0, "retain": "none"}),
        ("satimp", {"beta1": 0, "beta2": 0, "forget.weight": 1, "retain": "none"}),
    ):
        adapter = target.copy()
        ends.append(run(adapter, name, schedule=schedule, **overrides).model.state_dict())
    for other in ends[1:]:
        for key, value in ends[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)


def test_rmu_moves_its_window_only_and_steers_to_its_vector(target):
    layers = target.layers()
    direction = build("rmu").forget[0].direction(64)

    def states(model, records) -> torch.Tensor:
        batch = target.collate([target.encode(r) for r in records])
        with torch.no_grad():
            return target.forward(model, batch, frozenset({f"features:{layers[1]}"})).features(layers[1])

    def cosine(model) -> float:
        return torch.cosine_similarity(states(model, FORGET), direction[None], dim=1).mean().item()

    drift = {}
    schedule = {"name": "fixed", "lr": 4e-3, "steps": 40, "batch": 6, "warmup": 0, "decay": "constant"}
    for retain in (None, {"weight": 10}):
        adapter = target.copy()
        before = copy.deepcopy(adapter.model.state_dict())
        model = run(adapter, "rmu", retain=retain, width=2, schedule=schedule).model
        for key, value in model.state_dict().items():
            inside = key.startswith((layers[0] + ".", layers[1] + ".")) and "down_proj" in key
            assert torch.equal(before[key], value) != inside, key
        kept = states(target.model, RETAIN)
        drift[retain is None] = ((states(model, RETAIN) - kept).norm() / kept.norm()).item()
        if retain is None:
            assert cosine(model) > 0.9 > cosine(target.model)
            assert states(model, FORGET).norm(dim=1).mean().item() == pytest.approx(6.5, rel=0.15)
    assert drift[False] < 0.3 * drift[True]


def test_undial_at_strength_zero_and_kl_alone_leave_the_target_as_it_is(target):
    schedule = {"name": "fixed", "lr": 1e-3, "steps": 2, "batch": 6, "warmup": 0}
    for name, overrides in (("undial", {"beta": 0}), ("finetune", {"retain": "kl"})):
        adapter = target.copy()
        before = losses(adapter, facts())
        gradient = run(adapter, name, schedule=schedule, **overrides).history[0]["gradient_norm"]
        assert gradient < 1e-5
        assert losses(adapter, facts()) == pytest.approx(before, abs=0.05)


def test_the_papers_crossing_runs(target):
    """NPO with a divergence, on a LoRA, with the forget gradient projected off the retain gradient."""
    adapter = target.copy()
    outcome = run(
        adapter,
        "npo",
        retain="kl",
        parameters={"name": "lora", "rank": 4},
        gradient="project",
        schedule={"name": "fixed", "lr": 1e-2, "steps": 20, "batch": 6, "warmup": 0},
    )
    assert outcome.steps == 20
    adapter.model = outcome.model
    assert losses(adapter, FORGET) > losses(target, FORGET) + 0.5
