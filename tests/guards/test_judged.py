"""Guards are judged as methods are: at best suppressed, and with the false refusals that they cost."""

import math

import pytest
import torch

from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.results import Verdict
from expunge.data.records import RecordSet
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import guard_model
from expunge.guards.policy import Row
from expunge.guards.request import targets_of
from tests.guards.conftest import KEY


@pytest.fixture(scope="module")
def document(people):
    """The target, retrained models, and the target behind four guards."""
    targets = targets_of(people.split.forget, people.split.retain)
    every = Row(detector="always", action="refuse", label="every")
    guards = {
        "filter": ("filter", targets),
        "no targets": ("filter", []),
        "prompt": ("prompt", targets),
        "mute": ([every], targets),
    }
    models = [AuditedModel("target", "target", people.target())]
    models += [AuditedModel(f"retrained {s}", "retrained", people.retrained(s)) for s in (1, 2)]
    for name, (guard, hidden) in guards.items():
        adapter = GuardedAdapter(guard_model(people.target(), guards=guard, targets=hidden, key=KEY))
        models.append(AuditedModel(name, "unlearned", adapter, method=name, asked=True))
    sets = {n: RecordSet(n, tuple(getattr(people.split, n))) for n in ("forget", "retain", "holdout")}
    settings = AuditSettings(attacks=("paraphrased-question", "many-shot", "logit-lens", "prune"), budget=60)
    return audit(models, sets, settings)


def entry(document, label):
    return next(m for m in document.models if m.label == label)


def test_what_a_guard_hides_is_suppressed_and_never_forgotten(document):
    judged = {m.label: m.judgement for m in document.models}
    assert judged["filter"].verdict is Verdict.SUPPRESSED
    assert "weights" in judged["filter"].reason
    assert judged["no targets"].verdict is Verdict.NOT_FORGOTTEN
    assert judged["prompt"].verdict in (Verdict.DAMAGED, Verdict.NOT_FORGOTTEN)  # this model has learnt no instructions
    assert judged["mute"].verdict is Verdict.DAMAGED
    assert Verdict.FORGOTTEN not in {j.verdict for j in judged.values()}


def test_only_what_somebody_sees_who_asks_is_measured(document):
    checks = {c.name: c.outcome for c in entry(document, "filter").judgement.checks}
    assert not {"attack (logit-lens)", "attack (prune)"} & set(checks)
    assert checks["relearning"] == checks["quantisation"] == "not run"
    assert not any(n.startswith("membership") for n in checks)
    assert "attack (paraphrased-question)" in checks
    assert any("can only be asked" in s for s in document.not_shown)


def test_a_refusal_is_no_knowledge_beside_models_that_are_surely_wrong(document, people):
    """Losses count up to that of a guess: else who refuses would know more than a retrained model that says something else."""
    guess = math.log(people.target().model.config.vocab_size)

    def losses(model):
        with torch.no_grad():
            found = [
                model.forward(model.model, model.collate([model.encode(r)]), frozenset({"losses"})) for r in people.split.forget
            ]
        return [float(f.values["losses"].mean()) for f in found]

    retrained = [losses(people.retrained(s)) for s in (1, 2)]
    assert any(n > guess for some in retrained for n in some)
    expected = guess - sum(min(n, guess) for some in retrained for n in some) / sum(map(len, retrained))
    check = next(c for c in entry(document, "filter").judgement.checks if c.name == "likelihood")
    assert check.difference == pytest.approx(expected, abs=1e-4)
    assert expected >= 0


def test_an_answer_that_is_stopped_on_its_way_is_a_refusal(people):
    """A name that stands in answers alone: what is refused are the answers of the target that say it, neither more nor fewer."""
    target, kept = people.target(), people.split.retain
    said = [g.text for g in target.generate(target.model, [target.encode(r) for r in kept], 64)]
    asked = " ".join(r.prompt for r in kept)
    names = [w.strip(".,") for t in said for w in t.split() if w[:1].isupper()]
    name = next(n for n in names if len(n) > 4 and n not in asked and any(f" {n}" in t for t in said))
    held = [{"entities": [name]}]
    guarded = GuardedAdapter(guard_model(people.target(), guards="filter", targets=held, key=KEY))
    models = [AuditedModel("target", "target", target), AuditedModel("guarded", "unlearned", guarded, asked=True)]
    sets = {n: RecordSet(n, tuple(getattr(people.split, n))) for n in ("forget", "retain")}
    document = audit(models, sets, AuditSettings.quick(metrics=("refused", "rouge-l-recall")))
    refused = entry(document, "guarded").numbers["retain.refused"].value
    assert refused == pytest.approx(sum(f" {name}" in f" {t}" for t in said) / len(said))
    assert 0 < refused < 1


def test_false_refusals_have_their_intervals(document):
    numbers = entry(document, "filter").numbers
    assert numbers["forget.refused"].value == 1
    assert numbers["retain.refused"].value == 0
    assert numbers["retain.refused"].low == 0 < numbers["retain.refused"].high < 0.5
    assert entry(document, "mute").numbers["retain.refused"].value == 1
    assert entry(document, "target").numbers["forget.refused"].value == 0
