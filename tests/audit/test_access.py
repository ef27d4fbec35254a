"""An audit with less access than the weights: nothing more is read, what can be said so is said, and never "forgotten"."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.guards.conftest import KEY, name_of

from expunge.adapters.language import LanguageAdapter
from expunge.audit.arrays import Arrays
from expunge.audit.evidence import Evidence, Subject
from expunge.audit.metrics.rouge import rouge_l
from expunge.audit.run import AuditedModel, access_of, audit
from expunge.audit.settings import AuditSettings
from expunge.audit.telling import told
from expunge.audit.verdict import judge
from expunge.core.access import Level, Offer
from expunge.core.errors import InputError
from expunge.core.results import Verdict
from expunge.data.records import Record, RecordSet
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import guard_model
from expunge.guards.target import Target
from expunge.report.html import write
from expunge.report.view import access as access_told
from expunge.report.weakest import control_faults

torch.set_num_threads(1)
WORDS = AuditSettings(access=Level.TEXT, draws=100, attacks=("role-play", "relearn-lora"))


class Mute(LanguageAdapter):
    """A model that is only let speak: whatever reads its scores is an error."""

    def __init__(self, adapter: LanguageAdapter) -> None:
        vars(self).update(vars(adapter))

    def forward(self, *given, **more):
        raise AssertionError("scores were read")

    logit_blocks = forward


def filtered(adapter: LanguageAdapter, world) -> GuardedAdapter:
    names = sorted({name_of(r) for r in world.split.forget})
    targets = [Target(id=f"t{i}", entities=(n,)) for i, n in enumerate(names)]
    return GuardedAdapter(guard_model(adapter, guards="filter", targets=targets, key=KEY))


def held(world, retain=30):
    return {
        "forget": RecordSet("forget", tuple(world.split.forget)),
        "retain": RecordSet("retain", tuple(world.split.retain[:retain])),
        "holdout": RecordSet("holdout", tuple(world.split.holdout[:10])),
    }


@pytest.fixture(scope="module")
def document(people_world):
    """Target, three retrained models, a guard and the bare target again, asked in words."""
    world = people_world
    models = [
        AuditedModel("target", "target", Mute(world.target())),
        *(AuditedModel(f"retrained {s}", "retrained", Mute(world.retrained(s))) for s in (1, 2, 3)),
        AuditedModel("guarded", "unlearned", filtered(Mute(world.target()), world), asked=True),
        AuditedModel("bare", "unlearned", Mute(world.target())),
    ]
    return audit(models, held(world), WORDS)


def judged(document, label):
    return document.entry(label).judgement


def test_a_model_that_still_answers_is_found_out_by_its_words(document):
    for label in ("target", "bare"):
        found = judged(document, label)
        assert found.verdict is Verdict.NOT_FORGOTTEN
        assert {c.name for c in found.checks if c.outcome == "knows more"} >= {"answers", "remembered", "left behind"}


def test_retrained_models_are_not_said_to_leak_and_not_said_to_have_forgotten(document):
    for label in ("retrained 1", "retrained 2", "retrained 3"):
        found = judged(document, label)
        assert found.verdict is Verdict.UNDECIDED, found.reason
        assert "answers in words alone no more can be shown" in found.reason
        assert not [c for c in found.checks if c.outcome in ("knows more", "knows less", "hides")]
    assert not control_faults(document)


def test_a_guard_is_suppressed_for_two_reasons_and_its_refusals_are_counted(document):
    found = judged(document, "guarded")
    assert found.verdict is Verdict.SUPPRESSED
    checks = {c.name: c for c in found.checks}
    assert checks["attack (taken-apart)"].outcome == "knows more"
    assert "tells 100% of the forget answers" in checks["attack (taken-apart)"].text
    assert checks["refusals"].outcome == "hides"
    numbers = document.entry("guarded").numbers
    assert numbers["forget.refused"].value == 1
    assert numbers["retain.refused"].value == 0
    assert numbers["holdout.refused"].value < 0.5  # what a model makes up of strangers may hold a hidden name


def test_nothing_of_scores_is_in_the_document_and_the_access_is_stated(document, tmp_path):
    assert document.protocol["access"] == "text"
    keys = {k for m in document.models for k in m.numbers}
    unreadable = ("probability", "loss", "truth-ratio", "extraction", "membership", "privleak", "model-utility", "relearn")
    assert not [k for k in keys for word in unreadable if word in k]
    assert not document.distributions
    assert any("no log-probability was read" in s for s in document.not_shown)
    assert "Not tried, since it takes more than this access: relearn-lora." in document.not_shown
    assert "role-play" in document.protocol["metrics"]
    assert access_told(document) == "Access: answers in words, as somebody has who can only ask."
    write([document], tmp_path / "page.html")
    assert access_told(document) in (tmp_path / "page.html").read_text()


def test_what_a_model_tells_is_rouge_of_its_answer_and_of_a_text_that_of_its_continuation(people_world):
    target = people_world.target()
    texts = RecordSet(
        "forget", tuple(Record(f"t{i}", f"{r.prompt} {r.answer}") for i, r in enumerate(people_world.split.forget[:6]))
    )
    questions = held(people_world)["forget"][:6]
    for records in (questions, texts):
        evidence = Evidence({"m": Subject("m", "target", "f", Mute(target))}, {"forget": records}, access=Level.TEXT)
        found = told(evidence, "m", "forget")
        assert found.present.all()
        assert ((found.values >= 0) & (found.values <= 1)).all()
    evidence = Evidence({"m": Subject("m", "target", "f", Mute(target))}, {"forget": questions}, access=Level.TEXT)
    own = [g.text for g in target.generate(target.model, [target.encode(r) for r in questions], 200)]
    want = [rouge_l(t, r.answer, "recall", True, "unicode") for t, r in zip(own, questions, strict=True)]
    assert told(evidence, "m", "forget").values.tolist() == want


def test_a_score_is_never_read_behind_the_back_of_the_access(people_world):
    evidence = Evidence({"m": Subject("m", "target", "f", people_world.target())}, held(people_world), access=Level.TEXT)
    with pytest.raises(InputError, match="answers in words alone"):
        evidence.scores("m", "forget")
    assert evidence.lengths("m", "forget")[0] == people_world.target().encode(people_world.split.forget[0]).n_targets


def test_what_reads_more_than_words_is_refused_where_it_is_named_and_left_out_where_not():
    words = WORDS.within(Level.TEXT)
    assert words.attacks == ("role-play",)
    assert words.relearn is None
    assert words.quantise == ()
    with pytest.raises(InputError, match="nobody has who gets answers in words"):
        AuditSettings(metrics=("probability",), access=Level.TEXT).chosen()
    quick = AuditSettings.quick().within(Level.TEXT)
    assert not quick.options
    assert {m.name for m in quick.chosen(frozenset({Offer.TEXT, Offer.GENERATE}))} == {
        "fluency", "knowledge-memorisation", "refused", "rouge-l-recall", "verbatim-memorisation",
    }  # fmt: skip
    every = AuditSettings(attacks="all").within(Level.TEXT).attacks
    assert "role-play" in every
    assert not {"yes-no", "prompt-inversion", "keyword-emphasis", "taken-apart", "prune"} & set(every)


def test_the_access_is_what_all_models_offer_and_no_more_can_be_asked_for(people_world):
    plain = AuditedModel("plain", "target", people_world.target())
    guard = AuditedModel("guard", "unlearned", lambda: None, asked=True)
    assert access_of([plain]) is Level.WEIGHTS
    assert access_of([plain, guard]) is Level.SCORES
    assert access_of([plain, guard], Level.TEXT) is Level.TEXT
    with pytest.raises(InputError, match="'guard' gives no access to weights"):
        access_of([plain, guard], Level.WEIGHTS)


def test_rows_cannot_be_asked_in_words(digits):
    models = [AuditedModel("target", "target", digits.target())]
    table, _ = digits.tables
    with pytest.raises(InputError, match="answer in words"):
        audit(models, {"forget": RecordSet("forget", tuple(table.rows()[:8]))}, AuditSettings(access=Level.TEXT))


# ---- the verdict by itself


def answering(label: str, shares, refused=None, nll=None) -> Arrays:
    shares = np.asarray(shares, dtype=np.float64)
    names = [f"p{i // 4}" for i in range(len(shares))]
    told = None if nll is not None else shares
    return Arrays(
        label, list(map(str, range(len(shares)))), names, nll=np.empty(0) if nll is None else nll, told=told,
        refused=np.zeros(len(shares)) if refused is None else np.asarray(refused, dtype=np.float64),
    )  # fmt: skip


def draws(mean: float, seed: int, n: int = 80):
    return np.clip(np.random.default_rng(seed).normal(mean, 0.1, n), 0, 1)


GOLD = [answering(f"r{s}", draws(0.3, s)) for s in range(1, 4)]
FULL = answering("target", np.ones(80))


def outcome(found, name):
    return next((c.outcome for c in found.checks if c.name == name), None)


def test_refusals_hide_only_beyond_what_retrained_models_show():
    quiet = answering("quiet", draws(0.3, 9))
    shares = [0.0, 0.03, 0.5]
    seen = []
    for share in shares:
        refused = np.arange(80) < round(80 * share)
        found = judge(replace(quiet, refused=refused.astype(float)), GOLD, FULL, access=Level.TEXT)
        seen.append(outcome(found, "refusals"))
    assert seen == [None, "equivalent", "hides"]
    assert found.verdict is Verdict.SUPPRESSED
    assert "what stands behind is not shown" in found.reason


def test_who_still_tells_behind_refusals_has_not_forgotten():
    half = answering("half", np.where(np.arange(80) < 40, 0.0, 1.0), refused=np.arange(80) < 40)
    assert judge(half, GOLD, FULL, access=Level.TEXT).verdict is Verdict.NOT_FORGOTTEN


def test_one_that_tells_far_less_than_retrained_models_is_damaged():
    gold = [answering(f"r{s}", draws(0.6, s)) for s in range(1, 4)]
    found = judge(answering("empty", np.zeros(80)), gold, FULL, access=Level.TEXT)
    assert found.verdict is Verdict.DAMAGED
    assert "Over-unlearned" in found.reason


def test_a_guess_of_one_answer_is_no_leak_and_a_subject_that_is_left_is():
    guess = draws(0.3, 9)
    guess[0] = 1.0
    assert judge(answering("guess", guess), GOLD, FULL, access=Level.TEXT).verdict is Verdict.UNDECIDED
    left = draws(0.3, 9)
    left[:4] = 1.0
    found = judge(answering("left", left), GOLD, FULL, access=Level.TEXT)
    assert outcome(found, "left behind") == "knows more"
    assert found.verdict is Verdict.NOT_FORGOTTEN


def test_below_the_weights_scores_cannot_acquit_either():
    def scored(label, mean, seed):
        return answering(label, np.zeros(80), nll=np.random.default_rng(seed).normal(mean, 0.1, 80))

    gold = [scored(f"r{s}", 3.0, s) for s in range(1, 4)]
    sample = {"utility": {"retain": _useful()}}
    gold, full = [replace(g, **sample) for g in gold], replace(scored("target", 0.1, 0), **sample)
    asked = replace(scored("asked", 3.0, 9), **sample)
    from expunge.audit.arrays import Thresholds

    loose = Thresholds(require_attacks=False)
    assert judge(asked, gold, full, loose).verdict is Verdict.FORGOTTEN
    found = judge(asked, gold, full, loose, access=Level.SCORES)
    assert found.verdict is Verdict.UNDECIDED
    assert "log-probabilities alone" in found.reason


def _useful():
    from expunge.audit.arrays import Sample

    return Sample(np.full(20, 0.9) + np.linspace(-0.01, 0.01, 20), [str(i) for i in range(20)])


def test_models_of_different_access_are_not_compared():
    with pytest.raises(InputError, match="same access"):
        judge(FULL, [answering("r", np.zeros(80), nll=np.zeros(80))], FULL)


def test_a_protocol_says_what_its_access_left_out(document):
    settings = AuditSettings.under("removal-v1", access="text").within(Level.TEXT)
    assert "access" in settings.protocol_label()
    assert "access" not in AuditSettings.under("removal-v1").within(Level.WEIGHTS).protocol_label()
    assert json.loads(document.model_dump_json())["protocol"]["access"] == "text"
