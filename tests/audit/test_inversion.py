"""Inversion of prompts: an inverter reads secrets from log-ratios, and who was asked about from the answers of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inside_models import SCHEDULE, judged, unlearned
from tests.world import World
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.inversion import PromptInversion, held_out, telling_tokens
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.inverter import Sequel, fit_inverter, recovered
from expunge.audit.kernel.inversion import independent_tokens, log_ratios
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet

KEY = "forget.prompt-inversion"
CHOICES = 6  #: tokens that each place of a secret may hold


@pytest.fixture(scope="module")
def secrets() -> list[Sequel]:
    """Three secret tokens before a fixed text, and what a small model with random weights goes on with, as log-ratios."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    )
    model = LlamaForCausalLM(config).eval()
    drawn = torch.randint(0, CHOICES, (500, 3), generator=torch.Generator().manual_seed(1)) + 10
    ids = torch.cat([drawn, torch.tensor([50, 60]).expand(500, 2)], dim=1)
    logs = []
    with torch.no_grad():
        for _ in range(4):
            logs.append(model(input_ids=ids).logits[:, -1].double().log_softmax(-1))
            ids = torch.cat([ids, logs[-1].argmax(-1, keepdim=True)], dim=1)
    said = torch.stack(logs, dim=1).numpy()
    ratios = log_ratios(said, independent_tokens(said.reshape(-1, 200), seed=666, tolerance=1e-4))
    return [Sequel(r, d.numpy()) for r, d in zip(ratios, drawn, strict=True)]


def read(inverter, pairs) -> float:
    """Share of tokens that are read right."""
    return float(np.concatenate([right for _, right in recovered(inverter, pairs)]).mean())


def test_an_inverter_reads_secrets_that_it_has_not_seen(secrets):
    """Well above one in six; and no better than that from what followed other secrets."""
    train, test = secrets[:400], secrets[400:]
    words = np.arange(10, 10 + CHOICES)
    assert secrets[0].ratios.shape[1] <= 32
    inverter = fit_inverter(train, words, epochs=25)
    assert read(inverter, test) > 0.5
    for logs, right in recovered(inverter, test[:5]):
        assert logs.shape == right.shape == (3,)
        assert (logs < 0).all()
        assert (logs[right] > np.log(1 / CHOICES)).all()
    wrong = [Sequel(a.ratios, b.prompt) for a, b in zip(test, [*test[1:], test[0]], strict=True)]
    assert read(inverter, wrong) < 0.35


def test_the_seed_decides_everything_and_drawing_leaves_no_trace(secrets):
    words = np.arange(10, 10 + CHOICES)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    made = [fit_inverter(secrets[:40], words, epochs=1, seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    logs = [recovered(m, secrets[:3])[0][0].tolist() for m in made]
    assert logs[0] == logs[1] != logs[2]


def test_a_destroyed_model_is_no_input():
    bad = Sequel(np.full((2, 3), np.nan), np.array([1]))
    with pytest.raises(InputError, match="finite"):
        fit_inverter([bad], np.array([1]))
    with pytest.raises(InputError, match="finite"):
        fit_inverter([], np.array([1]))


def test_half_of_each_subject_is_tried():
    clusters = ["a"] * 4 + ["b"] * 3 + ["c"]
    tried = held_out(clusters, 0)
    assert [int(tried[:4].sum()), int(tried[4:7].sum()), int(tried[7])] == [2, 1, 0]
    assert any(not np.array_equal(held_out(clusters, s), tried) for s in range(1, 5))
    assert np.array_equal(held_out(clusters, 0), tried)


def test_tokens_tell_where_they_are_those_of_one_subject():
    prompts = [np.array(p) for p in ([1, 7, 2], [1, 7, 3], [1, 8, 2], [1, 8, 9])]
    found = telling_tokens(prompts, ["a", "a", "b", "b"])
    # 3 and 9 stand in one prompt each: a question of its own, not a subject's name
    assert [f.tolist() for f in found] == [[False, True, False]] * 2 + [[False, True, False]] * 2


# ---- in an audit


def evidence_of(models: dict[str, tuple[str, LanguageAdapter]], world: World) -> Evidence:
    subjects = {label: Subject(label, role, adapter.fingerprint(), adapter) for label, (role, adapter) in models.items()}
    return Evidence(subjects, {"forget": world.split.forget, "retain": world.split.retain}, Protocol(draws=100))


@pytest.mark.slow
def test_answers_with_wrong_facts_still_tell_who_was_asked_about(small_world):
    """Names are read badly from the answers of retrained models, and well from those of a model that was taught wrong facts."""
    wrong = {"schedule": SCHEDULE | {"lr": 1e-3, "steps": 60}}
    models = {
        "target": ("target", small_world.target()),
        "retrained 1": ("retrained", small_world.retrained(1)),
        "retrained 2": ("retrained", small_world.retrained(2)),
        "same start": ("unlearned", small_world.retrained(0)),
        "idk": ("unlearned", unlearned(small_world, "idk-nll", **wrong)),
    }
    evidence, attack = evidence_of(models, small_world), PromptInversion()
    assert attack.lacks(evidence, "forget") == ""
    found = {n: attack.compute(evidence, n) for n in models}
    values = {n: numbers[KEY].value for n, numbers in found.items()}
    others = [values[n] for n in ("retrained 1", "retrained 2", "same start")]
    assert values["target"] > max(others) + 0.5, values
    assert values["idk"] > max(others) + 0.5, values
    assert found["target"][f"{KEY}.tokens"].value > found["retrained 1"][f"{KEY}.tokens"].value
    assert judged(attack, evidence, "idk")[0] > 0.5
    for label in ("retrained 1", "retrained 2", "same start"):
        assert judged(attack, evidence, label)[1].outcome != "knows more"


def test_too_little_training_tells_nothing_and_says_so(small_world):
    """After one pass the inverter cannot read the target either: the check is not run."""
    models = {
        "target": ("target", small_world.target()),
        "retrained 1": ("retrained", small_world.retrained(1)),
        "retrained 2": ("retrained", small_world.retrained(2)),
    }
    evidence, attack = evidence_of(models, small_world), PromptInversion(epochs=1, tokens=3)
    check = judged(attack, evidence, "retrained 1")[1]
    assert check.outcome == "not run"
    found = attack.values(evidence, "target", "forget")
    assert found.present.sum() == len(small_world.split.forget) // 2
    assert (found.values[found.present] < 0).all()
    exact = attack.column(evidence, "target", "forget", "exact")
    assert set(exact.values[exact.present]) <= {0.0, 1.0}


def test_ratios_are_those_of_the_answers_own_tokens(target, sets):
    """Against a pass of the model over prompt and answer."""
    subject = Subject("target", "target", target.fingerprint(), target)
    evidence = Evidence({"target": subject}, sets, Protocol(draws=100))
    attack = PromptInversion(tokens=4, ratios=7)
    records = list(sets["forget"])[:10]
    chosen = np.random.default_rng([0, 21]).permutation(len(target.tokenizer))[:8]
    for record, pair in zip(records, attack.sequels(evidence, "target", target, records), strict=True):
        ids = list(pair.prompt)
        example = target.encode(record)
        assert ids == example.data.ids[: example.data.start].tolist()
        for row in pair.ratios:
            with torch.no_grad():
                logs = target.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()
            np.testing.assert_allclose(row, logs[chosen[1:]] - logs[chosen[0]], atol=1e-4)
            ids.append(int(logs.argmax()))
        assert 1 <= len(pair.ratios) <= 4


def test_what_is_missing_is_said(target, sets):
    attack = PromptInversion()
    subjects = {"target": Subject("target", "target", target.fingerprint(), target)}
    assert "retain" in attack.lacks(Evidence(subjects, {"forget": sets["forget"]}), "forget")
    alone = RecordSet("forget", tuple(Record(f"r{i}", "Yes.", f"Is it {i}?") for i in range(4)))
    assert "two questions" in attack.lacks(Evidence(subjects, {"forget": alone, "retain": sets["retain"]}), "forget")
    texts = RecordSet("forget", tuple(Record(f"t{i}", "Some text.", subject="book") for i in range(4)))
    assert "plain text" in attack.lacks(Evidence(subjects, {"forget": texts, "retain": sets["retain"]}), "forget")
    assert attack.lacks(Evidence(subjects, sets), "forget") == ""
