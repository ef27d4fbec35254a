"""Results that are more than weights are taken apart: the target inside is found, named, and no verdict calls it removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audit_models import Counter
from inside_models import unlearned
from tests.world import World

from expunge.adapters.apart import WITHOUT_ADAPTER, WITHOUT_PROJECTIONS, parts
from expunge.adapters.combination import Combination
from expunge.adapters.combined import join
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.projection import Projection, install, installed, orthonormal
from expunge.audit.attacks.apart import every_part
from expunge.audit.document import AuditDocument
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.results import Verdict
from expunge.data.records import RecordSet
from expunge.report.html import write
from expunge.report.weakest import weakest

torch.set_num_threads(1)
LIGHT = AuditSettings(relearn=None, quantise=(), metrics=("loss",), draws=100)
BRIEF = {"name": "fixed", "batch": 8, "warmup": 0}


def logits(adapter: LanguageAdapter, records) -> torch.Tensor:
    with torch.no_grad():
        return adapter.forward(adapter.model, adapter.collate([adapter.encode(r) for r in records]), frozenset({"logits"})).logits


@pytest.fixture(scope="module")
def assisted(small_world: World) -> LanguageAdapter:
    """ULD's result: the target with an assistant whose scores are taken away; what must be kept is kept."""
    schedule = BRIEF | {"lr": 1e-2, "steps": 200, "batch": 15, "warmup": 0.05}
    return unlearned(small_world, "uld", schedule=schedule, finish={"scale": 1.0})


@pytest.fixture(scope="module")
def gated(small_world: World) -> LanguageAdapter:
    return unlearned(small_world, "o3", schedule=BRIEF | {"lr": 1e-2, "steps": 60}, finish={"scale": 1.0})


@pytest.fixture(scope="module")
def projected(small_world: World) -> LanguageAdapter:
    """The target without so many directions of its states that it knows nothing any more."""
    adapter = small_world.target()
    rows = torch.randn(40, adapter.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    install(adapter.model, adapter.layers()[-1], Projection(orthonormal(rows)))
    return adapter


def audited(world: World, models: dict[str, LanguageAdapter], settings: AuditSettings = LIGHT, **options) -> AuditDocument:
    """An audit of unlearned models beside target and two retrained ones, on records without wrong answers to compare with: the
    truth ratio would tell ULD's and O3's results from retrained models by what they say."""
    held = [
        AuditedModel("target", "target", world.target()),
        *(AuditedModel(f"retrained {s}", "retrained", world.retrained(s)) for s in (1, 2)),
        *(AuditedModel(label, "unlearned", adapter) for label, adapter in models.items()),
    ]
    bare = {
        name: RecordSet(name, tuple(replace(r, paraphrase="", perturbed=()) for r in records))
        for name, records in (("forget", world.split.forget), ("retain", world.split.retain))
    }
    return audit(held, bare, settings, **options)


def test_what_is_taken_out_is_the_target_bit_by_bit(small_world, assisted, gated, projected):
    target = small_world.target()
    records = [*small_world.split.forget, *small_world.split.retain][:12]
    for adapter, name in ((assisted, "the target"), (gated, "the target"), (projected, WITHOUT_PROJECTIONS)):
        before, whole = adapter.fingerprint(), logits(adapter, records)
        part = adapter.parts()[name]
        assert part.fingerprint() == target.fingerprint() != before
        assert torch.equal(logits(part, records), logits(target, records))
        assert not torch.allclose(whole, logits(target, records), atol=0.1)
        assert adapter.fingerprint() == before  # and the model is left as it was
        assert torch.equal(logits(adapter, records), whole)
    assert installed(projected.model)


def test_a_plain_model_has_no_parts_and_no_such_check(small_world):
    adapter = small_world.retrained(0)
    assert adapter.parts() == {}
    document = audited(small_world, {"plain": adapter})
    model = document.models[-1]
    assert model.judgement is not None
    assert not any("taken-apart" in c.name for c in model.judgement.checks)
    assert not any("taken-apart" in key for m in document.models for key in m.numbers)
    assert "taken-apart" not in document.protocol["metrics"]


def test_the_verdict_on_composites_names_the_target_inside(small_world, assisted, gated, projected, tmp_path):
    models = {"uld": assisted, "o3": gated, "projected": projected}
    document = audited(small_world, models)
    full = document.models[0].numbers["forget.loss"].value
    for model in document.models[3:]:
        judgement = model.judgement
        assert judgement is not None
        found = next(c for c in judgement.checks if c.name == "attack (taken-apart)")
        assert found.outcome == "knows more"
        assert found.margin == 0
        assert found.text.startswith("Not removed: the target's weights lie in the model unchanged")
        assert model.numbers["forget.taken-apart"].value == pytest.approx(full, rel=1e-6)
        assert judgement.verdict in (Verdict.SUPPRESSED, Verdict.NOT_FORGOTTEN, Verdict.DAMAGED)
    assert not any("taken-apart" in c.name for m in document.models[:3] for c in m.judgement.checks)
    uld = document.models[3].judgement
    assert uld.verdict is Verdict.SUPPRESSED
    assert "the target's weights lie in the model unchanged" in uld.reason
    assert weakest(uld).name == "attack (taken-apart)"
    write([document], tmp_path / "report.html")
    assert "the target&#39;s weights lie in the model unchanged" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_target_inside_is_the_weakest_link_whatever_else_comes_back(small_world, assisted):
    """Relearning brings much back; what lies there unchanged is said all the same, by the protocol's criterion too."""
    settings = AuditSettings.under("removal-v1", metrics=("loss",), draws=100, quantise=(8,), relearn={"steps": [1, 5]})
    settings = settings.model_copy(update={"attacks": ("logit-lens", "taken-apart")})
    document = audited(small_world, {"uld": assisted}, settings)
    judgement = document.models[-1].judgement
    assert judgement.verdict is Verdict.SUPPRESSED
    assert weakest(judgement).name == "attack (taken-apart)"
    finding = next(f for f in judgement.criteria if f.id == "R8")
    assert finding.outcome == "failed"
    assert "taken-apart" in " ".join(finding.checks)
    assert finding.text.startswith("Not removed")
    gold = next(f for f in document.models[1].judgement.criteria if f.id == "R8")
    assert "taken-apart" not in " ".join(gold.checks)
    assert gold.outcome != "failed"


def test_an_assistant_that_knows_is_found_by_its_answers(small_world):
    """No part is the target; one knows as much, and that is shown by comparison."""
    ignorant, knowing = small_world.retrained(0), small_world.target()
    with torch.no_grad():
        next(knowing.model.parameters()).view(-1)[0] += 1e-3  # other weights than the target's
    model = join(ignorant, knowing, Combination(weight=-1e-3))
    document = audited(small_world, {"joined": model})
    found = next(c for c in document.models[-1].judgement.checks if c.name == "attack (taken-apart)")
    assert found.outcome == "knows more"
    assert found.margin
    assert "differs from the retrained models' by" in found.text
    innocent = join(small_world.retrained(0), small_world.retrained(2), Combination(weight=-1e-3))
    calm = next(c for c in audited(small_world, {"joined": innocent}).models[-1].judgement.checks if "taken-apart" in c.name)
    assert calm.outcome != "knows more"


def test_an_adapter_that_was_not_merged_is_said_and_counts_on_request(small_world):
    from peft import LoraConfig, get_peft_model

    adapter = small_world.target()
    adapter.model = get_peft_model(adapter.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.model.eval()
    (name, part), *rest = every_part(adapter)
    assert (name, rest) == (WITHOUT_ADAPTER, [])
    assert part.fingerprint() == small_world.target().fingerprint()
    assert parts(part.model) == {}
    document = audited(small_world, {"lora": adapter})
    assert any("an adapter that was not merged" in text for text in document.not_shown)
    assert not any("taken-apart" in c.name for c in document.models[-1].judgement.checks)
    strict = LIGHT.model_copy(update={"attack_options": {"taken-apart": {"adapters": True}}})
    found = next(c for c in audited(small_world, {"lora": adapter}, strict).models[-1].judgement.checks if "taken" in c.name)
    assert (found.outcome, found.margin) == ("knows more", 0)


def test_a_second_audit_takes_nothing_apart_again(small_world, assisted, tmp_path: Path):
    adapter = assisted
    first = audited(small_world, {"uld": adapter}, cache=tmp_path)
    with Counter(adapter.model.target) as counted:
        second = audited(small_world, {"uld": adapter}, cache=tmp_path)
    assert counted.passes == 0
    assert second.models[-1].judgement == first.models[-1].judgement


def test_it_can_be_left_out(small_world, assisted):
    document = audited(small_world, {"uld": assisted}, LIGHT.model_copy(update={"usual": False}))
    assert not any("taken-apart" in c.name for c in document.models[-1].judgement.checks)
