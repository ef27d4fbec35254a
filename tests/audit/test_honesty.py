"""Nothing is said from too little, and impossible values are explained: in the document, the terminal and the page."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.membership import MEMBERSHIP
from expunge.audit.attacks.registry import ATTACKS, Access, fitting
from expunge.audit.document import AuditDocument
from expunge.audit.evidence import Evidence, Protocol, Subject
from expunge.audit.metrics.forget_quality import ForgetQuality, log10_floor, power
from expunge.audit.metrics.membership import exploded, privleak, strange
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.results import Direction, Number, Verdict
from expunge.core.statistics import Interval, auc, bootstrap, wilson
from expunge.data.records import RecordSet
from expunge.report.html import html
from expunge.report.terminal import print_summary

torch.set_num_threads(1)


def terminal(document: AuditDocument) -> str:
    out = io.StringIO()
    print_summary([document], console=Console(file=out, width=400, no_color=True))
    return out.getvalue()


def some(records: RecordSet, count: int) -> RecordSet:
    """So many records, of as many people as there are."""
    rows = sorted(records, key=lambda r: r.id.rpartition("-")[2])
    return RecordSet(records.name, tuple(rows[:count]))


def quick() -> tuple[str, ...]:
    """The attacks that only ask or score."""
    offers = LanguageAdapter.offers
    return tuple(
        n for n in fitting(offers) if not ATTACKS.get(n).copies and ATTACKS.get(n).access in (Access.TEXT, Access.SCORES)
    )


@pytest.fixture(
    scope="module",
    params=[(1, "quick"), (2, "quick"), (5, "quick"), *(pytest.param((n, "all"), marks=pytest.mark.slow) for n in (1, 2, 5))],
)
def small(request, sets, target, retrained) -> tuple[int, AuditDocument]:
    """Every metric and attack on forget, retain and holdout sets of so many records; those that train or look inside: slow."""
    count, which = request.param
    few = {name: some(records, count) for name, records in sets.items()}
    models = [
        AuditedModel("target", "target", target),
        *(AuditedModel(f"retrained {i}", "retrained", r) for i, r in enumerate(retrained)),
        AuditedModel("unlearned", "unlearned", retrained[0].copy()),
    ]
    with torch.no_grad():
        next(models[-1].adapter.model.parameters()).add_(0.01)
    settings = AuditSettings(attacks=quick() if which == "quick" else "all", relearn={"steps": [1]}, quantise=(8,), draws=100)
    return count, audit(models, few, settings)


def test_every_metric_and_attack_says_too_few(small):
    _, document = small
    numbers = {(m.label, key): n for m in document.models for key, n in m.numbers.items()}
    assert len(numbers) > 40
    for key, number in numbers.items():
        if number.n == 1:
            assert number.value is None, key
        if number.value is not None and number.over == "examples":
            enough = number.low is not None and number.clusters >= 6
            said = any(f.startswith("too few") for f in number.flags)
            assert said or enough or "proportion" in number.note, (key, number)
        if number.value is None:
            assert number.note or number.flags, key
    few = [n for n in numbers.values() if any("too few" in f for f in n.flags)]
    assert len(few) > 0.5 * len(numbers)
    assert not [k for k, n in numbers.items() if n.value is not None and n.over == "examples" and n.low is None and not n.flags]


def test_too_few_is_read_on_the_page_and_in_the_terminal(small):
    count, document = small
    page, printed = html([document]), terminal(document)
    for text in (page, printed):
        assert "too few" in text
    if count == 1:
        assert "nothing is reported from fewer than two" in page or "a single scored record" in page
        assert "No verdict was reached: it needs at least two forget records." in printed
    else:
        assert not any(
            m.judgement is not None and m.judgement.verdict == "forgotten" for m in document.models if m.role == "unlearned"
        )


@pytest.mark.parametrize(("groups", "said"), [(1, "an interval needs two"), (2, "needs 6"), (5, "needs 6"), (6, "")])
def test_an_interval_of_resampled_means_needs_six_groups(groups, said):
    """C groups lie all on one side of the median with probability 2^(1-C): below six no interval can hold 95 %."""
    number = bootstrap(np.arange(2.0 * groups), [f"g{i % groups}" for i in range(2 * groups)]).number(Direction.REFERENCE)
    assert number.value is not None
    assert " ".join(number.flags).endswith(said)
    assert bool(number.flags) == bool(said)
    rng = np.random.default_rng(0)
    if 2 <= groups <= 3:  # and so it is: intervals of two or three groups miss the mean far more often than one in twenty
        inside = 0
        for draw in range(200):
            found = bootstrap(rng.standard_normal(groups), [str(i) for i in range(groups)], seed=draw, draws=200)
            inside += found.low <= 0 <= found.high
        assert inside / 200 < 0.9


def test_what_is_exact_needs_no_more_and_a_single_value_is_withheld():
    assert not wilson(0, 3).number(Direction.REFERENCE).flags
    alone = bootstrap([0.7], ["a"]).number(Direction.REFERENCE)
    assert alone.value is None
    assert "too few" in alone.flags[0]
    one = Number(value=0.3, over="none", n=1, direction=Direction.REFERENCE).checked()
    assert one.value is None
    assert "single record" in one.flags[0]
    two = Interval(0.3, 0.1, 0.4, 0.95, 40, 12, fewest=2).number(Direction.REFERENCE)
    assert "2 independent groups" in two.flags[0]


# ---- impossible values


def evidence_of(models, sets) -> Evidence:
    subjects = {k: Subject(k, role, adapter.fingerprint(), adapter) for k, (role, adapter) in models.items()}
    return Evidence(subjects, sets, Protocol(draws=100))


def test_privleak_in_the_thousands_says_why_and_reaches_the_reader(sets, target, retrained, monkeypatch):
    """Retrained models tell the sets apart nearly perfectly; the model under audit the other way round: 100 (1 - 0.02) / 0.02."""
    value = privleak(0.0, 0.98)
    assert value == pytest.approx(4900)
    said = exploded(value, 0.98)
    assert "the sets differ" in said
    assert "over-unlearned" in said
    assert not exploded(100.0, 0.5)
    assert not exploded(privleak(0.0, 0.5), 0.5)
    attack = MEMBERSHIP.get("loss")
    rng = np.random.default_rng(0)
    plain = attack.values

    def given(self, evidence, label, name):
        found = plain(self, evidence, label, name)
        noise = rng.normal(0, 0.05, len(found.values))
        unseen = name == "holdout"
        knows = evidence.subject(label).role != "unlearned"  # the sets differ: even retrained models tell them apart
        return found._replace(values=noise + (1.0 if unseen == knows else 0.0))

    monkeypatch.setattr(attack, "values", given)
    monkeypatch.setattr("expunge.audit.metrics.membership.auc", lambda a, b: min(0.98, auc(a, b)))  # at 1 it has no value at all
    other = retrained[0].copy()
    with torch.no_grad():
        next(other.model.parameters()).add_(0.01)
    models = [
        AuditedModel("target", "target", target),
        AuditedModel("retrained", "retrained", retrained[0]),
        AuditedModel("retrained too", "retrained", other),
        AuditedModel("pushed", "unlearned", retrained[1]),
    ]
    options = {name: {"attacks": ("loss",)} for name in ("membership", "privleak")}
    settings = AuditSettings(metrics=("membership", "privleak", "loss"), options=options, relearn=None, quantise=(), draws=100)
    document = audit(models, sets, settings)
    numbers = document.models[-1].numbers
    assert numbers["privleak.loss"].value > 1000
    assert numbers["membership.loss"].value < 0.05
    page, printed = html([document]), terminal(document)
    for text in (page, printed):
        assert "over-unlearned, not private" in text
        assert "the sets differ" in text
    assert "not that it is so much more private" in page


def test_what_is_strange_is_strange_only_beside_retrained_models():
    assert "whoever turns the attack round" in strange(0.02, 0.5)
    assert "0.980" in strange(0.02, 0.5)
    assert strange(0.02, None)
    assert not strange(0.3, 0.5)
    assert not strange(0.02, 0.1)  # the sets differ: retrained models find the forget texts as strange


def test_a_verdict_of_over_unlearning_says_not_private(sets, target, retrained):
    """A model pushed beyond: the verdict and the flags agree."""
    pushed = retrained[0].copy()
    batch = pushed.collate([pushed.encode(r) for r in sets["forget"]])
    optimiser = torch.optim.AdamW(pushed.model.parameters(), lr=5e-4)
    for _ in range(12):
        loss = -pushed.forward(pushed.model, batch, frozenset({"losses"})).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    models = [
        AuditedModel("target", "target", target),
        *(AuditedModel(f"retrained {i}", "retrained", r) for i, r in enumerate(retrained)),
        AuditedModel("pushed", "unlearned", pushed),
    ]
    settings = AuditSettings(
        metrics=("membership", "loss"), options={"membership": {"attacks": ("loss",)}}, relearn=None, quantise=()
    )
    document = audit(models, {k: sets[k] for k in ("forget", "holdout")}, settings)
    judgement = document.models[-1].judgement
    assert judgement.verdict is Verdict.DAMAGED
    for text in (judgement.reason, html([document]), terminal(document)):
        assert "ver-unlearned, not private" in text


# ---- the Kolmogorov-Smirnov test


def test_forget_quality_carries_floor_and_power(sets, target, retrained):
    evidence = evidence_of({"t": ("target", target), "r": ("retrained", retrained[0]), "u": ("unlearned", retrained[1])}, sets)
    found = ForgetQuality().compute(evidence, "u")
    for number in found.values():
        assert f"the floor of log10 p at n = 12 is {log10_floor(12):.1f}" in number.note
        assert "power at n = 12: it finds" in number.note
        assert "too few: 12 records" in number.flags[0]
    assert math.isclose(log10_floor(12), math.log10(2 / math.comb(24, 12)))


def test_power_grows_with_records_and_shift_and_is_nothing_without_one():
    rng = np.random.default_rng(1)
    by_size = [power(rng.standard_normal(n), 0.3) for n in (40, 200, 400)]
    assert by_size[0] < 0.1
    assert by_size[1] > 0.7
    assert by_size[2] > 0.95
    ratios = rng.standard_normal(200)
    assert power(ratios, 0.0) < 0.05  # the samples are paired: two retrained models pass far more often than 19 times in 20
    assert power(ratios, 0.0) <= power(ratios, 0.2) <= power(ratios, 0.5)
    assert power(ratios, -0.5) == pytest.approx(power(ratios, 0.5), abs=0.05)
    assert power([1.0, 1.0, 1.0], 0.5) == 0
