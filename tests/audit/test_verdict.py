"""The verdict on models drawn from a known law, on those that were made to fool it, and on thin or broken evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.audit.synthetic_models import World, mixed, with_losses

from expunge.audit.arrays import Arrays, Sample, Thresholds
from expunge.audit.contrast import contrast, contrast_auc, moderated_error, moderated_spread
from expunge.audit.verdict import judge
from expunge.core import statistics as st
from expunge.core.errors import InputError
from expunge.core.results import Check, Judgement, Verdict

Maker = Callable[[World, Arrays], Arrays]


def verdict_on(make: Maker, k: int = 3, seed: int = 0, limits: Thresholds | None = None, **world: object) -> Judgement:
    w = World(seed=seed, **world)
    target, retrained = w.target(), [w.draw(f"retrained {i}") for i in range(k)]
    return judge(make(w, target), retrained, target, limits)


def check(judgement: Judgement, name: str) -> Check:
    return next(c for c in judgement.checks if c.name == name)


def retrained_again(w: World, target: Arrays) -> Arrays:
    return w.draw()


# ---- the two ends, and between


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("world", [{}, {"subjects": 6, "facts": 10}, {"subjects": 1, "facts": 40}, {"subjects": 60, "facts": 1}])
def test_a_further_retrained_model_is_forgotten_and_the_target_is_not(k: int, world: dict[str, int]) -> None:
    runs = 25
    found = Counter(verdict_on(retrained_again, k, seed, **world).verdict for seed in range(runs))
    assert found[Verdict.FORGOTTEN] >= 0.9 * runs
    assert found[Verdict.NOT_FORGOTTEN] == found[Verdict.SUPPRESSED] == found[Verdict.DAMAGED] == 0
    for seed in range(5):
        assert verdict_on(lambda w, t: t, k, seed, **world).verdict == Verdict.NOT_FORGOTTEN


def test_retrained_models_that_differ_much_are_rarely_accused() -> None:
    """Training noise of 9 % of the gap, nearly twice what is assumed, and small gaps with guessable answers."""
    for world in ({"shift": 0.3}, {"high": 1.5, "noise": 0.2, "shift": 0.05, "low": 0.1}, {"noise": 1.0}):
        found = Counter(verdict_on(retrained_again, 3, seed, **world).verdict for seed in range(40))
        assert found[Verdict.FORGOTTEN] >= 0.9 * 40
        assert found[Verdict.NOT_FORGOTTEN] + found[Verdict.SUPPRESSED] <= 2


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.75, 1.0])
def test_a_model_part_of_the_way_to_the_target_is_not_forgotten(share: float, k: int) -> None:
    for seed in range(5):
        assert verdict_on(lambda w, t: mixed(w.draw(), t, share), k, seed).verdict == Verdict.NOT_FORGOTTEN


def test_the_verdict_does_not_return_to_forgotten_as_knowledge_grows() -> None:
    found = [verdict_on(lambda w, t, s=share: mixed(w.draw(), t, s), 3).verdict for share in np.linspace(0, 1, 11)]
    assert found[0] == Verdict.FORGOTTEN
    first = next(i for i, v in enumerate(found) if v != Verdict.FORGOTTEN)
    assert Verdict.FORGOTTEN not in found[first:]
    assert found[-1] == Verdict.NOT_FORGOTTEN


def test_thresholds_can_be_changed_and_are_written() -> None:
    def slight(w: World, target: Arrays) -> Arrays:
        only_nll = replace(mixed(w.draw(), target, 0.18), log_truth_ratio=None, extraction=None, membership={})
        return replace(only_nll, relearn=w.draw().relearn)

    lenient = verdict_on(slight, 5, limits=Thresholds(margin=0.4), shift=0.02, subjects=60)
    strict = verdict_on(slight, 5, limits=Thresholds(margin=0.05, margin_cap=0.05), shift=0.02, subjects=60)
    assert lenient.verdict == Verdict.FORGOTTEN
    assert strict.verdict == Verdict.NOT_FORGOTTEN
    assert strict.thresholds["margin"] == 0.05
    assert set(lenient.thresholds) == set(Thresholds.model_fields)
    with pytest.raises(InputError, match=r"'margin' of Thresholds must be a float in \(0, 0\.5\]"):
        Thresholds(margin=0.9)


def test_without_a_retrained_model_nothing_is_said() -> None:
    for make in (retrained_again, lambda w, t: t):
        found = verdict_on(make, k=0)
        assert found.verdict == Verdict.NO_GOLD
        assert "no retrained model" in found.reason


# ---- models that would fool a test of means, or of nothing but outputs


def test_known_answers_behind_a_right_mean_are_found() -> None:
    """30 % of the answers by heart, the rest pushed away until the mean NLL is exactly that of a retrained model."""

    def hidden(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        kept = w.rng.random(len(honest.nll)) < 0.3
        nll = np.where(kept, target.nll, honest.nll)
        nll[~kept] += (honest.nll.mean() - nll.mean()) / (~kept).mean()
        fooled = with_losses(honest, nll, attacked=False)
        return replace(fooled, log_truth_ratio=None, extraction=None, membership={})

    for seed in range(5):
        found = verdict_on(hidden, 3, seed)
        assert found.verdict == Verdict.NOT_FORGOTTEN
        assert check(found, "likelihood").outcome != "knows more"
        assert check(found, "remembered").outcome == "knows more"


@pytest.mark.parametrize("k", [1, 3])
def test_one_person_left_behind_is_found_and_named(k: int) -> None:
    def spared(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        one = np.array([c == "person-7" for c in honest.clusters])
        return with_losses(honest, np.where(one, target.nll, honest.nll))

    found = verdict_on(spared, k)
    assert found.verdict == Verdict.NOT_FORGOTTEN
    left = check(found, "left behind")
    assert left.outcome == "knows more"
    assert "1 are still mostly known (person-7)" in left.text
    assert check(found, "likelihood").outcome == "equivalent"


def relapsing(w: World, target: Arrays, from_step: int = 5) -> Arrays:
    """Outputs of a retrained model, but training on the other half brings most of the held-out half back."""
    honest = w.draw()
    curve = [replace(p, losses_heldout=0.3 + 0.1 * p.losses_heldout) if p.step >= from_step else p for p in honest.relearn]
    return replace(honest, relearn=curve)


def test_what_relearning_brings_back_was_suppressed() -> None:
    for make in (relapsing, lambda w, t: relapsing(w, t, from_step=20)):
        found = verdict_on(make, 3)
        assert found.verdict == Verdict.SUPPRESSED
        assert "relearning" in found.reason
        assert check(found, "likelihood").outcome == "equivalent"


def test_the_relapse_is_said_in_steps_and_held_against_retrained_models() -> None:
    found = check(verdict_on(relapsing, 3), "relearning").text
    assert "5 steps on 50% of the forget set bring half of the rest back; retrained models do not get there in 20." in found
    never = check(verdict_on(retrained_again, 3), "relearning").text
    assert "20 steps on 50% of the forget set do not bring half of the rest back." in never

    def from_the_start(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        return replace(honest, relearn=[replace(p, losses_heldout=0.1 * p.losses_heldout) for p in honest.relearn])

    assert "half of the rest" not in check(verdict_on(from_the_start, 3), "relearning").text  # it was never gone


def test_what_is_learnt_from_the_other_half_by_all_models_alike_is_no_relapse() -> None:
    """Retrained models lose a third of their loss under the attack; the same loss in the subject must not convict."""
    found = verdict_on(retrained_again, 3)
    assert check(found, "relearning").outcome == "equivalent"


def at_a_ruinous_rate(model: Arrays, losses: np.ndarray) -> Arrays:
    """The same model, attacked at a second learning rate that leaves these losses at every step."""
    more = [replace(p, lr=1.0, losses_heldout=p.losses_heldout if p.step == 0 else losses) for p in model.relearn]
    return replace(model, relearn=[*model.relearn, *more])


def test_an_attack_that_ruins_retrained_models_need_not_acquit_but_may_convict() -> None:
    w = World()
    n = len(w.heldout)
    target, subject = w.target(), w.draw()
    retrained = [at_a_ruinous_rate(w.draw(), w.rng.normal(9, 6, n)) for _ in range(3)]
    noisy = judge(at_a_ruinous_rate(subject, w.rng.normal(9, 6, n)), retrained, target)
    assert noisy.verdict == Verdict.FORGOTTEN
    back = judge(at_a_ruinous_rate(subject, np.full(n, 0.2)), retrained, target)
    assert back.verdict == Verdict.SUPPRESSED


@pytest.mark.parametrize("bits", [4, 8])
def test_what_rounding_brings_back_was_suppressed(bits: int) -> None:
    def brittle(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        return replace(honest, quantised={**honest.quantised, bits: 0.4 * honest.nll + 0.6 * target.nll})

    found = verdict_on(brittle, 3)
    assert found.verdict == Verdict.SUPPRESSED
    assert f"{bits} bits" in found.reason


def test_rounding_that_breaks_every_model_tells_nothing() -> None:
    def broken(model: Arrays) -> Arrays:
        return replace(model, quantised={**model.quantised, 4: np.full_like(model.nll, 6.0) + 0.01 * model.nll})

    w = World()
    target, retrained = broken(w.target()), [broken(w.draw()) for _ in range(3)]
    found = judge(broken(w.draw()), retrained, target)
    assert check(found, "quantisation to 4 bits").outcome == "not run"
    assert found.verdict == Verdict.FORGOTTEN


def test_a_relapse_weighs_more_than_over_unlearning() -> None:
    def pushed(w: World, target: Arrays) -> Arrays:
        return with_losses(relapsing(w, target), w.draw().nll + 4, attacked=False)

    assert verdict_on(pushed, 3).verdict == Verdict.SUPPRESSED


# ---- damage


def test_over_unlearning_is_damage_and_said_to_be_that() -> None:
    found = verdict_on(lambda w, t: with_losses(w.draw(), w.draw().nll + 3.0), 3)
    assert found.verdict == Verdict.DAMAGED
    assert "Over-unlearned" in found.reason
    assert check(found, "likelihood").outcome == "knows less"


def test_over_unlearning_seen_only_by_a_membership_attack() -> None:
    def odd(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        scores = honest.membership["loss"]
        return replace(honest, membership={"min-k": (scores[0] + 2, scores[1])})

    w = World()
    target, retrained = w.target(), [w.draw() for _ in range(3)]
    controls = [replace(r, membership={"min-k": r.membership["loss"]}) for r in (*retrained, target)]
    found = judge(odd(w, target), controls[:-1], controls[-1])
    assert found.verdict == Verdict.DAMAGED
    assert "min-k" in found.reason


def lame(model: Arrays, loss: float) -> Arrays:
    kept = model.utility["retain probability"]
    return replace(model, utility={"retain probability": Sample(kept.values - loss, kept.clusters)})


def test_lost_utility_is_damage_and_a_small_loss_is_not() -> None:
    assert verdict_on(lambda w, t: lame(w.draw(), 0.4), 3).verdict == Verdict.DAMAGED
    assert verdict_on(lambda w, t: lame(w.draw(), 0.05), 3).verdict == Verdict.FORGOTTEN
    both = verdict_on(lambda w, t: lame(t, 0.4), 3)
    assert both.verdict == Verdict.DAMAGED
    assert "still knows" in both.reason


def test_utility_is_held_against_the_less_able_of_target_and_retrained() -> None:
    """A retrained model has less to learn and may be better on the rest; unlearning cannot give what the target never had."""
    w = World()
    target, retrained = lame(w.target(), 0.2), [w.draw() for _ in range(3)]
    assert judge(lame(w.draw(), 0.2), retrained, target).verdict == Verdict.FORGOTTEN
    assert judge(lame(w.draw(), 0.5), retrained, target).verdict == Verdict.DAMAGED


def test_an_aggregate_utility_and_fluency_convict_too() -> None:
    assert verdict_on(lambda w, t: replace(w.draw(), model_utility=0.0), 3).verdict == Verdict.DAMAGED

    def babbling(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        return replace(honest, degenerate={"retain": Sample(np.ones(100), honest.degenerate["retain"].clusters)})

    found = verdict_on(babbling, 3)
    assert found.verdict == Verdict.DAMAGED
    assert "Fluency" in found.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_damage(value: float) -> None:
    def destroyed(w: World, target: Arrays) -> Arrays:
        honest = w.draw()
        return replace(honest, nll=np.where(np.arange(len(honest.nll)) == 3, value, honest.nll))

    found = verdict_on(destroyed, 3)
    assert found.verdict == Verdict.DAMAGED
    assert Judgement.model_validate_json(found.model_dump_json()) == found


# ---- thin evidence is no evidence


def test_a_target_that_knows_nothing_leaves_nothing_to_judge() -> None:
    w = World()
    found = judge(w.draw(), [w.draw(), w.draw()], w.draw("a target that never memorised"))
    assert found.verdict == Verdict.UNDECIDED
    assert "target cannot be told" in found.reason


def test_without_attacks_or_utility_it_is_not_forgotten_but_undecided() -> None:
    bare = verdict_on(lambda w, t: replace(w.draw(), relearn=(), quantised={}), 3)
    assert bare.verdict == Verdict.UNDECIDED
    assert "no attack" in bare.reason
    allowed = verdict_on(lambda w, t: replace(w.draw(), relearn=(), quantised={}), 3, limits=Thresholds(require_attacks=False))
    assert allowed.verdict == Verdict.FORGOTTEN
    blind = verdict_on(lambda w, t: replace(w.draw(), utility={}, model_utility=None, degenerate={}), 3)
    assert blind.verdict == Verdict.UNDECIDED
    assert "utility was not measured" in blind.reason


def test_too_few_answers_are_undecided_and_the_text_says_how_many_it_would_take() -> None:
    found = [verdict_on(retrained_again, 1, seed, subjects=3, facts=1, noise=1.5) for seed in range(20)]
    counted = Counter(f.verdict for f in found)
    assert counted[Verdict.FORGOTTEN] <= 4
    wide = [c for f in found for c in f.checks if c.outcome == "undecided" and "too wide" in c.text]
    assert wide
    assert all("would be needed" in c.text for c in wide)


def test_one_retrained_model_is_said_to_leave_training_noise_unknown() -> None:
    assert "noise of training is unknown" in verdict_on(retrained_again, 1).reason
    assert "unknown" not in verdict_on(retrained_again, 3).reason


def test_missing_quantities_are_left_out_and_every_check_says_something() -> None:
    w = World()
    bare = [replace(a, log_truth_ratio=None, extraction=None, membership={}) for a in (w.draw(), w.draw(), w.target())]
    found = judge(bare[0], [bare[1]], bare[2])
    assert {c.name for c in found.checks} >= {"likelihood", "remembered", "left behind", "relearning", "quantisation to 4 bits"}
    assert not {c.name for c in found.checks} & {"truth ratio", "extraction"}
    assert all(c.text.endswith(".") or c.text.endswith(".)") for c in found.checks)


def test_missing_truth_ratios_of_some_answers_are_left_out_of_all_models() -> None:
    w = World()
    models = [w.draw(), w.draw(), w.draw(), w.target()]
    gone = np.arange(len(models[0].nll)) % 3 == 0
    with_gaps = [replace(m, log_truth_ratio=np.where(gone, np.nan, m.log_truth_ratio)) for m in models]
    found = judge(with_gaps[0], with_gaps[1:3], with_gaps[3])
    expected = np.mean((models[0].log_truth_ratio - (models[1].log_truth_ratio + models[2].log_truth_ratio) / 2)[~gone])
    assert check(found, "truth ratio").difference == pytest.approx(expected)


def test_arrays_of_other_examples_are_refused() -> None:
    w = World()
    target, retrained, subject = w.target(), w.draw(), w.draw()
    with pytest.raises(InputError, match="same forget examples"):
        judge(replace(subject, ids=[*subject.ids[1:], "other"]), [retrained], target)
    with pytest.raises(InputError, match="differ in length"):
        judge(replace(subject, extraction=subject.extraction[1:]), [retrained], target)
    with pytest.raises(InputError, match="not finite"):
        judge(subject, [replace(retrained, nll=np.full_like(retrained.nll, np.nan))], target)
    with pytest.raises(InputError, match="relearning curves differ"):
        judge(replace(subject, relearn=subject.relearn[:-1]), [retrained], target)


def test_numbers_in_a_check_are_in_the_quantity_s_own_unit_and_sign() -> None:
    w = World()
    target, retrained = w.target(), [w.draw(), w.draw()]
    found = judge(target, retrained, target)
    gap = float(target.nll.mean() - np.mean([r.nll.mean() for r in retrained]))
    likelihood, auc = check(found, "likelihood"), check(found, "membership (loss)")
    assert likelihood.difference == pytest.approx(gap)
    assert likelihood.difference < 0
    assert likelihood.low < gap < likelihood.high
    assert likelihood.margin == pytest.approx(0.25 * abs(gap), rel=0.3)
    assert "100% of the way to the target" in likelihood.text
    areas = [st.auc(a.membership["loss"][1], a.membership["loss"][0]) for a in (target, *retrained)]
    assert auc.difference == pytest.approx(areas[0] - np.mean(areas[1:]))
    assert auc.difference > 0


def test_the_order_of_retrained_models_does_not_matter() -> None:
    w = World()
    target, retrained, subject = w.target(), [w.draw() for _ in range(4)], w.draw()
    assert judge(subject, retrained, target).verdict == judge(subject, retrained[::-1], target).verdict
    a, b = (judge(subject, r, target) for r in (retrained, retrained[::-1]))
    for x, y in zip(a.checks, b.checks, strict=True):
        assert (x.name, x.outcome) == (y.name, y.outcome)


# ---- the statistics underneath


def test_moderated_error_is_the_clustered_one_with_many_clusters_and_exists_with_one() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=200), 5) + rng.normal(size=1000)
    names = [f"c{i // 5}" for i in range(1000)]
    error, freedom = moderated_error(values, names)
    assert error == pytest.approx(st.cluster_standard_error(values, names), rel=0.02)
    assert freedom == 202
    alone, three = moderated_error(values[:50], ["a"] * 50)
    assert (alone, three) == (pytest.approx(values[:50].std(ddof=1) / np.sqrt(50)), 3)
    single = [str(i) for i in range(1000)]
    assert moderated_error(values, single) == (pytest.approx(st.cluster_standard_error(values, single)), 999)


def test_moderated_spread_goes_from_the_assumption_to_the_evidence() -> None:
    assert moderated_spread([1.0], 0.3) == (pytest.approx(0.3), 4)
    many = np.random.default_rng(0).normal(0, 2.0, 400)
    assert moderated_spread(list(many), 0.3)[0] == pytest.approx(many.std(ddof=1), rel=0.01)
    assert moderated_spread([0.0, 1.0], 0.0)[0] == pytest.approx(np.sqrt(0.5 / 5))


def test_contrast_band_and_orientation() -> None:
    w = World(subjects=50)
    target, retrained, subject = w.target(), [w.draw() for _ in range(3)], w.draw()
    found = contrast(subject.nll, [r.nll for r in retrained], w.clusters, 3.2, toward=-1, noise=0.05)
    assert found.difference == pytest.approx(np.mean([r.nll.mean() for r in retrained]) - subject.nll.mean())
    low, high = found.interval(0.9)
    assert low < found.difference < high
    assert found.band(0.95) > 2 * found.spread
    assert found.p_more() + found.p_less() == pytest.approx(1)

    def scores(a: Arrays) -> tuple[np.ndarray, np.ndarray]:
        return a.membership["loss"][1], a.membership["loss"][0]

    groups = (target.holdout_clusters, target.clusters)
    area = contrast_auc(scores(subject), [scores(r) for r in retrained], scores(target), groups, noise=0.05)
    assert area.share < 0.3
    assert contrast_auc(
        scores(target), [scores(r) for r in retrained], scores(target), groups, noise=0.05
    ).share == pytest.approx(1)
