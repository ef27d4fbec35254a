"""The one parser from names and settings to a recipe."""

from __future__ import annotations

import json
import re

import pytest

from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides
from expunge.engine.schedule import Adaptive, Fixed
from expunge.methods.recipe import build, from_spec
from expunge.methods.registry import METHODS

PUBLISHED = {
    "altpo", "ceu", "dpo", "finetune", "gradascent", "graddiff", "graddiff-kl", "idk-nll", "idkdpo", "npo", "pdu", "retrain",
    "rmu", "satimp", "simnpo", "task-vector", "undial", "wga",
}  # fmt: skip


def words(*pairs: str):
    """Overrides as typed on a command line."""
    return parse_overrides(pairs)


def test_every_method_of_the_promise_is_there():
    assert set(METHODS.names()) >= PUBLISHED
    assert METHODS.broken() == {}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("schedule", ["adaptive", "paper"])
def test_a_spec_rebuilds_its_recipe_through_json(name, schedule):
    recipe = build(name, {"schedule": schedule})
    assert from_spec(json.loads(json.dumps(recipe.spec()))) == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_default_schedule_is_adaptive_and_paper_is_the_published_one(name):
    assert isinstance(build(name).schedule, Adaptive)
    assert build(name, {"schedule": "paper"}).schedule == METHODS.get(name).published


# ---- published numbers


def test_published_coefficients():
    def terms(name):
        recipe = build(name)
        return [(t.name, t.weight) for t in recipe.forget], [(t.name, t.weight) for t in recipe.retain]

    assert terms("npo") == ([("npo", 1.0)], [("nll", 1.0)])
    assert terms("simnpo") == ([("simnpo", 0.125)], [("nll", 1.0)])
    assert terms("satimp") == ([("satimp", 0.1)], [("nll", 1.0)])
    assert terms("rmu") == ([("rmu", 1.0)], [("features", 1200.0)])
    assert terms("graddiff-kl") == ([("gradascent", 1.0)], [("kl", 1.0)])
    assert terms("gradascent") == ([("gradascent", 1.0)], [])
    assert terms("ceu") == ([("ceu", 1.0)], [])
    assert terms("undial") == ([("undial", 1.0)], [])
    assert terms("retrain") == ([], [("nll", 1.0)])
    assert build("npo").forget[0].beta == 0.1
    assert (build("simnpo").forget[0].beta, build("simnpo").forget[0].delta) == (4.5, 0.0)
    assert (build("satimp").forget[0].beta1, build("satimp").forget[0].beta2) == (5.0, 1.0)
    assert build("undial").forget[0].beta == 10.0
    assert build("rmu").forget[0].coefficient == 6.5
    balance = build("pdu").balance
    assert (balance.initial, balance.step, balance.eps, balance.warmup) == (100.0, 5.0, 0.3, 5.0)


def test_published_settings_bring_the_parts_that_belong_to_them():
    lora = build("undial", {"schedule": "paper"})
    assert (lora.schedule.lr, lora.parameters.name, lora.parameters.rank, lora.parameters.alpha) == (1e-4, "lora", 8, 16.0)
    assert build("undial", {"schedule": "paper", "parameters": "all"}).parameters.name == "all"
    assert build("undial").parameters.name == "all"
    assert build("task-vector").finish.scale is None
    assert build("task-vector", {"schedule": "paper"}).finish.scale == 5.0
    assert build("task-vector", words("schedule=paper", "scale=2")).finish.scale == 2.0
    assert build("npo", words("schedule=paper", "schedule.epochs=5")).schedule == Fixed(epochs=5)


# ---- ways to say it


def test_a_bare_field_a_slot_and_a_mapping_say_the_same():
    want = build("npo", {"beta": 0.2})
    assert want.forget[0].beta == 0.2
    assert build("npo", {"forget": {"beta": 0.2}}) == want
    assert build("npo", {"forget.beta": 0.2}) == want
    assert build("npo", {"forget": {"name": "npo", "beta": 0.2}}) == want
    assert build("npo", words("forget.beta=0.2")) == want
    assert build("npo", words("beta=2e-1")) == want


def test_terms_are_replaced_changed_listed_and_left_out():
    assert [t.name for t in build("npo", {"retain": "kl"}).retain] == ["kl"]
    assert build("npo", words("retain=kl", "retain.weight=2")).retain[0].weight == 2.0
    assert build("npo", {"retain": {"weight": 3}}).retain[0] == build("npo").retain[0].model_copy(update={"weight": 3.0})
    for nothing in ("none", None, []):
        assert build("npo", {"retain": nothing}).retain == ()
    both = build("npo", {"retain": ["nll", {"name": "kl", "weight": 0.5}]})
    assert [(t.name, t.weight) for t in both.retain] == [("nll", 1.0), ("kl", 0.5)]
    assert build("npo", words("retain=[nll,kl]", "retain.kl.weight=0.5")) == both


def test_naming_the_term_that_is_there_keeps_its_published_settings():
    assert build("simnpo", {"forget": "simnpo"}).forget[0].weight == 0.125
    assert build("simnpo", {"forget": {"name": "simnpo", "beta": 2.5}}).forget[0].weight == 0.125
    assert build("simnpo", {"forget": "npo"}).forget[0].weight == 1.0


def test_fields_that_belong_together_are_set_together():
    recipe = build("rmu", {"layer": 3, "reduce": "mean"})
    assert (recipe.forget[0].layer, recipe.retain[0].layer, recipe.parameters.layer) == (3, 3, 3)
    assert recipe.forget[0].reduce == recipe.retain[0].reduce == "mean"
    apart = build("rmu", {"layer": 3, "retain.layer": 2, "parameters": "all"})
    assert (apart.forget[0].layer, apart.parameters.name) == (3, "all")


def test_parts_cross_freely():
    recipe = build(
        "npo",
        words(
            "retain=kl", "parameters=lora", "parameters.rank=16", "gradient=project", "reference=adapter-off", "schedule.epochs=3"
        ),
    )
    assert (recipe.parameters.name, recipe.parameters.rank, recipe.gradient.name) == ("lora", 16, "project")
    assert (recipe.reference, recipe.schedule.name, recipe.schedule.epochs) == ("adapter-off", "adaptive", 3)


def test_a_bare_field_reaches_a_part_that_the_same_call_brings():
    assert build("npo", words("rank=4", "parameters=lora")).parameters.rank == 4
    assert build("npo", words("lr=1e-4", "schedule=paper")).schedule == Fixed(lr=1e-4)
    assert build("npo", words("eps=0.2", "balance=primal-dual")).balance.eps == 0.2


def test_a_recipe_of_ones_own():
    recipe = build(
        "custom",
        {
            "forget": [{"name": "gradascent", "weight": 0.5, "reduction": "sequence"}, "alternative-nll"],
            "retain": "kl",
            "schedule": {"name": "fixed", "lr": 1e-4, "steps": 10},
        },
    )
    assert [t.name for t in recipe.terms()] == ["gradascent", "alternative-nll", "kl"]
    assert recipe.schedule.steps == 10


def test_overrides_are_not_changed_by_parsing():
    given = {"retain": {"name": "kl"}, "retain.weight": 2, "schedule": {"name": "paper", "epochs": 5}}
    copy = json.loads(json.dumps(given))
    build("npo", given)
    assert given == copy


# ---- what is refused, and how it is said

REFUSED = [
    ("npoo", {}, "There is no method 'npoo'. Did you mean 'npo' or 'simnpo'?"),
    ("npo", {"betta": 1}, "There is no npo parameter 'betta'. Did you mean 'beta'?"),
    ("npo", {"gradent": "project"}, "There is no npo parameter 'gradent'. Did you mean 'gradient'"),
    ("npo", {"retian.weight": 2}, "There is no npo parameter 'retian'. Did you mean 'retain'"),
    ("npo", {"forget": {"betta": 1}}, "There is no npo parameter 'betta'. Did you mean 'beta'?"),
    ("npo", {"schedule": {"name": "paper", "eppochs": 1}}, "There is no fixed parameter 'eppochs'. Did you mean 'epochs'?"),
    ("npo", {"weight": 1}, "Several parts of npo have a parameter 'weight'. Say which one: forget.weight or retain.weight."),
    ("npo", {"beta": -1}, "Parameter 'beta' of npo must be a float in (0, inf); got -1."),
    ("npo", {"beta": "small"}, "Parameter 'beta' of npo must be a float in (0, inf); got 'small'."),
    (
        "npo",
        {"rank": 8},
        "No part of this npo has a parameter 'rank'. It belongs to parameters=assistant or parameters=fila or parameters=lora.",
    ),
    ("npo", {"retain": "kll"}, "There is no loss term 'kll'. Did you mean 'kl' or 'nll'?"),
    ("npo", {"gradient": "projekt"}, "There is no gradient rule 'projekt'. Did you mean 'project'?"),
    ("whp", {"forget": {"targets": "marked"}}, "'generic-nll' reads whole examples, not marked targets alone."),
    ("npo", {"gradient": "none"}, "gradient cannot be none. Known: null-space, pcgrad, plain, project, salient."),
    ("npo", {"gradient": 5}, "gradient must be the name of a part or a mapping; got 5."),
    ("npo", {"retain": 5}, "retain must be the name of a term, a mapping or a list of these; got 5."),
    ("npo", {"retain": ["nll", {"weight": 2}]}, "Each retain term needs a name; got {'weight': 2}."),
    ("npo", {"retain": ["nll", "kl"], "retain.weight": 2}, "There are several retain terms. Say which one: retain.nll.weight or"),
    ("gradascent", {"retain": {"weight": 2}}, "There is no retain term whose 'weight' could be set. Name one: retain=nll."),
    ("npo", {"finish": {"scale": 2}}, "There is no finish to change. Name one: finish=gate."),
    ("npo", {"start": "zero"}, "There is no choice of start 'zero'. Known: initial, target."),
    ("npo", {"reference": "copied"}, "There is no choice of reference 'copied'. Did you mean 'copy'?"),
    ("npo", {"retain": "npo"}, "'npo' is a forget term, but was given as a retain term. Write forget=npo."),
    ("npo", {"forget": "nll"}, "'nll' is a retain term, but was given as a forget term. Write retain=nll."),
    ("custom", {}, "The recipe 'custom' has no loss term. Give one, for example forget=npo retain=nll."),
    ("custom", {"forget": "npo", "schedule": "paper"}, "'custom' has no published schedule. Use schedule=adaptive"),
    ("gradascent", {"gradient": "project"}, "gradient=project needs a retain term, but 'gradascent' has none. Add retain=nll"),
    ("finetune", {"gradient": "pcgrad"}, "gradient=pcgrad needs a forget term, but 'finetune' has none. Add forget=npo"),
    (
        "pdu",
        {"retain": "none"},
        "balance=primal-dual needs a retain term, but 'pdu' has none. Add retain=nll, or use balance=fixed.",
    ),
    ("npo", {"reference": "adapter-off"}, "reference=adapter-off needs parameters=lora."),
    ("graddiff-kl", {"reference": "cached"}, "reference=cached holds log-probabilities only, but 'graddiff-kl' reads logits"),
    ("rmu", {"reference": "cached"}, "reference=cached holds log-probabilities only, but 'rmu' reads features of the reference."),
    ("task-vector", {"retain": "nll"}, "finish=negate turns around all that was learnt, so it can only follow forget-nll."),
    ("npo", {"finish": "negate"}, "finish=negate turns around all that was learnt, so it can only follow forget-nll."),
    ("task-vector", {"schedule": "fixed"}, "finish=negate has no scale, and a fixed schedule does not look for one."),
    ("npo", {"forget": "forget-nll"}, "'forget-nll' teaches the forget set. Add finish=negate to turn it around"),
    ("retrain", {"forget": "npo"}, "start=initial never saw the forget set, so there is nothing to forget."),
    ("retrain", {"retain": "kl"}, "start=initial must not learn from the target, which has seen the forget set."),
]


@pytest.mark.parametrize(("name", "overrides", "said"), REFUSED, ids=[f"{n}-{list(o)}" for n, o, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_clear_sentence(name, overrides, said):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        build(name, overrides)
    assert caught.value.exit_code == 2


def test_a_spec_with_an_unknown_slot_or_a_nameless_part_is_refused():
    spec = build("npo").spec()
    with pytest.raises(InputError, match="There is no part of a recipe 'retains'"):
        from_spec({**spec, "retains": []})
    with pytest.raises(InputError, match=r"gradient must be given by name; got \{\}"):
        from_spec({**spec, "gradient": {}})
    with pytest.raises(InputError, match="There is no loss term 'npoo'"):
        from_spec({**spec, "forget": [{"name": "npoo"}]})
