"""What is made before training: that it is read, deterministic, checked; and matching of an oracle, given or from a file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.digits import QUIET, accuracy, encoded
from torch import nn

import expunge
from expunge.adapters.supervised import RegressionAdapter
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.adversarial import classes_under_attack
from expunge.engine.loop import train
from expunge.engine.preparation import run_preparation
from expunge.methods.catalogue import describe
from expunge.methods.evaluate import loss_on, loss_terms
from expunge.methods.recipe import build, from_spec
from expunge.methods.registry import METHODS

MATCH = {"lr": 3e-3, "steps": 150, "batch": 99, "retain_batch": 400}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def scores(adapter, rows) -> torch.Tensor:
    batch = adapter.collate(encoded(adapter, rows))
    with torch.no_grad():
        return adapter.forward(adapter.model, batch, frozenset({"logits"})).logits


def distance(adapter, oracle, rows) -> float:
    return float((scores(adapter, rows) - scores(oracle, rows)).square().sum(1).mean())


def test_oracle_matching_goes_to_the_oracle_on_all_rows(digits) -> None:
    adapter, before, oracle = digits.target(), digits.target(), digits.retrained()
    kept = weights(oracle.model)
    outcome = train(adapter, build("oracle-matching", {"schedule": MATCH}), digits.examples(adapter), QUIET,
                    models={Of.ORACLE: oracle})  # fmt: skip
    assert outcome.reason == "schedule"
    (forget, retain), (unseen_forget, unseen_retain) = digits.split(), digits.split(1)
    for rows in (forget, retain, unseen_forget, unseen_retain):
        assert distance(adapter, oracle, rows) < 0.25 * distance(before, oracle, rows)
    assert accuracy(adapter, forget) < 0.05
    assert accuracy(adapter, unseen_retain) > 0.93
    assert all(torch.equal(v, kept[k]) for k, v in weights(oracle.model).items())
    assert all(p.requires_grad for p in oracle.model.parameters())


def test_outputs_from_a_file_are_the_oracle_itself(digits, tmp_path) -> None:
    oracle = digits.retrained()
    forget, retain = digits.split()
    ids = [r.id for r in (*forget, *retain)]
    logits = torch.cat([scores(oracle, forget), scores(oracle, retain)]).numpy()
    np.savez(tmp_path / "oracle.npz", ids=np.array(ids), logits=logits)
    schedule = {"schedule": {**MATCH, "steps": 20}}
    given = {"preparation": {"name": "given-outputs", "file": str(tmp_path / "oracle.npz")}}
    found = []
    for more, models in (({}, {Of.ORACLE: oracle}), (given, {})):
        adapter = digits.target()
        train(adapter, build("oracle-matching", {**schedule, **more}), digits.examples(adapter), QUIET, models=models)
        found.append(weights(adapter.model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-3, atol=1e-4)


def test_an_oracle_is_asked_for_before_any_work(digits) -> None:
    seen = digits.tables[0]
    model = digits.target().model
    before = weights(model)
    with pytest.raises(InputError, match="oracle=MODEL"):
        expunge.unlearn_rows(model, seen, classes=["3"], method="oracle-matching")
    assert "oracle" in METHODS.get("oracle-matching").wants
    assert describe("oracle-matching").wants == ("retain", "oracle")
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    done = expunge.unlearn_rows(
        model, seen, classes=["3"], method="oracle-matching", oracle=digits.retrained().model, schedule__lr=3e-3,
        schedule__steps=60,
    )  # fmt: skip
    assert done.reached
    adapter = digits.target()
    adapter.model = model
    assert accuracy(adapter, digits.split()[0]) < 0.1


@pytest.mark.parametrize(
    ("ids", "logits", "said"),
    [
        (["train0"], np.zeros((2, 10)), "have ids"),
        (["train0"], np.full((1, 10), np.nan), "finite"),
        (["train0"], np.zeros((1, 10)), "have no scores for the example"),
        (None, np.zeros((1, 10)), "holds no given outputs"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(digits, tmp_path, ids, logits, said) -> None:
    held = {"logits": logits} if ids is None else {"ids": np.array(ids), "logits": logits}
    np.savez(tmp_path / "oracle.npz", **held)
    adapter = digits.target()
    recipe = build("oracle-matching", {"preparation": {"name": "given-outputs", "file": str(tmp_path / "oracle.npz")}})
    with pytest.raises(InputError, match=said):
        train(adapter, recipe, digits.examples(adapter), QUIET)


def test_parts_that_do_not_fit_a_preparation_are_refused() -> None:
    given = {"name": "given-outputs", "file": "x.npz"}
    with pytest.raises(InputError, match="preparation=given-outputs makes oracle, which no term of 'npo' reads"):
        build("npo", {"preparation": given})
    with pytest.raises(InputError, match="no preparation 'given-output'"):
        build("npo", {"preparation": "given-output"})
    recipe = build("oracle-matching", {"preparation": given})
    assert from_spec(recipe.spec()) == recipe
    assert Of.ORACLE not in recipe.models(())
    assert Of.ORACLE in build("oracle-matching").models(())


def test_without_an_oracle_the_engine_says_so(digits) -> None:
    adapter = digits.target()
    with pytest.raises(InputError, match="given-outputs"):
        train(adapter, build("oracle-matching"), digits.examples(adapter), QUIET)


def test_a_recipe_with_a_preparation_can_be_evaluated_without_training(digits) -> None:
    adapter = digits.target()
    forget, retain = digits.split()
    got = loss_on(build("boundary-shrink", {"bound": 0.2}), adapter, None, forget)["total"]
    found = classes_under_attack(adapter, encoded(adapter, forget), bound=0.2, max_units=8192)
    taught = torch.tensor([found[r.id] for r in forget])
    batch = adapter.collate(encoded(adapter, forget))
    scores = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(scores, taught))
    laf = loss_on("laf", adapter, digits.target(), forget, retain, seed=1)
    assert laf["retain.laf-stay"].abs() < 1e-5  # nothing has moved yet
    assert 1 <= laf["retain.laf-keep"] < math.e
    matched = loss_on("oracle-matching", adapter, None, forget, retain, oracle=digits.retrained())
    assert matched["forget.forget-match"].item() == pytest.approx(distance(adapter, digits.retrained(), forget), rel=1e-4)
    with pytest.raises(InputError, match="'laf' reads what a preparation makes"):
        loss_terms("laf")


def test_random_numbers_of_a_preparation_leave_those_of_training_alone(digits) -> None:
    """The order of rows and the random state after a preparation are those without one."""
    adapter = digits.target()
    before = torch.get_rng_state()
    examples = {s: e for s, e in digits.examples(adapter).items() if s is not Stream.ALTERNATIVE}
    run_preparation(build("laf").preparation, adapter, examples, QUIET, scratch=None)
    run_preparation(build("unsir").preparation, adapter, examples, QUIET, scratch=None)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(InputError, match="preparation=noise needs classes, which a model for regression does not offer"):
        run_preparation(build("unsir").preparation, RegressionAdapter(nn.Linear(2, 1)), examples, QUIET, scratch=None)
    with pytest.raises(InputError, match="preparation=noise reads forget examples, but there are none"):
        run_preparation(build("unsir").preparation, adapter, {Stream.RETAIN: examples[Stream.RETAIN]}, QUIET, scratch=None)
