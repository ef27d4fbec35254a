"""Controls: what they measure, that resting examples leave no trace, and that they end a run."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import sentence_bleu

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.control import Control, Decision, Sight, Steering
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.controls import overlap
from expunge.methods.controls.memorisation import Memorisation
from expunge.methods.controls.overlap import bleu, shared_ngrams, token_f1
from expunge.methods.controls.overlap_flags import OverlapFlags
from expunge.methods.recipe import build

QUIET = Engine(checkpoint_every=0)
WORDS = [f"w{i}" for i in range(40)]


def text(*numbers: int) -> str:
    return " ".join(WORDS[i] for i in numbers)


RECORDS = [Record(f"r{i}", text(*(np.random.default_rng(i).permutation(40)[:8])), f"say {i}", subject=f"s{i}") for i in range(8)]


@pytest.fixture(scope="module")
def adapter() -> LanguageAdapter:
    tokenizer = word_tokenizer([*(f"{w} {w}" for w in WORDS), "Question: Answer: say tell ask 1 2 3 4 5 6 7"])
    held = LanguageAdapter(preset("llama-tiny", tokenizer, seed=0, context=48), tokenizer)
    recipe = build("finetune", {"schedule": {"name": "fixed", "lr": 1e-2, "steps": 60, "batch": 8, "warmup": 0.1}})
    train(held, recipe, {Stream.RETAIN: [held.encode(r) for r in RECORDS]}, QUIET)
    return held


def sight(adapter, records=RECORDS, targets="all", **streams) -> Sight:
    examples = {Stream.FORGET: [adapter.encode(r) for r in records], **streams}
    return Sight(adapter, adapter.model.eval(), examples, targets, 4096)


# ---- numbers


@pytest.mark.parametrize("seed", range(20))
def test_bleu_is_that_of_the_library(seed):
    rng = np.random.default_rng(seed)
    said, true = (rng.integers(0, 6, rng.integers(1, 12)).tolist() for _ in range(2))
    order = min(4, len(said), len(true))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts without a common n-gram
        wanted = sentence_bleu([true], said, weights=(1 / order,) * order)
    assert bleu(said, true) == pytest.approx(wanted, abs=1e-12)


def test_bleu_f1_and_shared_ngrams_by_hand():
    assert bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == pytest.approx(1.0)
    assert bleu([1, 2], [1, 2, 3, 4]) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu([], [1]) == bleu([1], []) == bleu([9, 9], [1, 2]) == 0
    assert token_f1([1, 1, 2], [1, 2, 2, 3]) == pytest.approx(2 * 2 / 7)
    assert token_f1([], []) == token_f1([1], [2]) == 0
    assert shared_ngrams([1, 2, 3, 9], [0, 1, 2, 3], 2) == pytest.approx(2 / 3)
    assert shared_ngrams([1, 2], [1, 2], 3) == 1
    assert shared_ngrams([1, 2, 3], [1, 2], 3) == 0
    assert shared_ngrams([1], [1, 2, 3], 2) == 0  # it ended before it had said anything
    assert token_f1(range(5), [4, 3, 2, 1, 0]) == 1 > bleu(list(range(5)), [4, 3, 2, 1, 0])


def test_segments_are_the_runs_of_marked_targets(adapter):
    record = Record("r", text(1, 2, 3, 4, 5), "say", spans=((0, 2), (6, 14)))
    example = adapter.encode(record)
    words = [adapter.tokenizer.decode([t]).strip() for t in adapter.spoken(example)]
    assert words == text(1, 2, 3, 4, 5).split()
    assert overlap.segments(adapter, example, "marked") == [(0, 1), (2, 5)]
    assert overlap.segments(adapter, example, "unmarked") == [(1, 2)]
    assert overlap.segments(adapter, example, "all") == [(0, 5)]
    assert overlap.segments(adapter, adapter.encode(RECORDS[0]), "marked") == []


def test_accuracy_and_extraction_equal_a_plain_loop(adapter):
    spread = adapter.copy()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in spread.model.parameters():
            p.add_(0.06 * torch.randn_like(p))
    held = sight(spread)
    accuracies = overlap.accuracy(spread, spread.model, held.examples[Stream.FORGET], "all", 60)
    likelihoods = overlap.extraction(spread, spread.model, held.examples[Stream.FORGET], "all", 60, n=3, points=99)
    assert 0 < np.mean(accuracies) < 1
    assert 0 < np.mean(likelihoods) < 1
    for example, accuracy, likelihood in zip(held.examples[Stream.FORGET], accuracies, likelihoods, strict=True):
        ids, start = example.data.ids.tolist(), example.data.start
        true, shares = ids[start:-1], []

        def greedy(prompt: list[int], count: int) -> list[int]:
            out = list(prompt)
            for _ in range(count):
                with torch.no_grad():
                    out.append(int(spread.model(input_ids=torch.tensor([out])).logits[0, -1].argmax()))
                if out[-1] in spread.end_ids:
                    return out[len(prompt) : -1]
            return out[len(prompt) :]

        right = [greedy(ids[: start + t], 1) == [true[t]] for t in range(len(true))]
        for t in range(len(true) - 3 + 1):
            said, suffix = greedy(ids[: start + t], len(true) - t), true[t:]
            grams = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
            known = {tuple(suffix[i : i + 3]) for i in range(len(suffix) - 2)}
            shares.append(np.mean([g in known for g in grams]) if grams else 0.0)
        assert accuracy == pytest.approx(np.mean(right))
        assert likelihood == pytest.approx(np.mean(shares))


# ---- resting


class Rest(Control):
    """Lets the named examples rest from the first look on, and stops at a given one."""

    name = "rest"
    who: tuple[int, ...] = ()
    stop_at: int = 0

    def look(self, sight, state):
        state["looks"] = state.get("looks", 0) + 1
        done = self.stop_at == state["looks"]
        return Decision(frozenset(self.who), "it was asked to" if done else "", {"looks": float(state["looks"])})


FIXED = {"name": "fixed", "lr": 1e-3, "batch": 4, "warmup": 0, "decay": "constant", "weight_decay": 0, "epochs": 3}


def run(adapter, recipe, forget, retain, **more):
    held = adapter.copy()
    examples = {Stream.FORGET: [held.encode(r) for r in forget], Stream.RETAIN: [held.encode(r) for r in retain]}
    outcome = train(held, recipe, examples, QUIET, **more)
    return outcome, outcome.model.state_dict()


def test_a_resting_example_leaves_no_trace(adapter):
    """From the same weights, a step with resting examples is the step without them, and a batch of resting ones is none."""
    forget, retain = RECORDS[:4], RECORDS[4:]
    recipe = build("graddiff", {"schedule": {**FIXED, "clip": None}}).model_copy(update={"control": Rest(who=(1, 3))})
    held = []
    outcome, resting = run(adapter, recipe, forget, retain, observe=lambda _, m: held.append(copy.deepcopy(m.state_dict())))
    assert [row.get("control.resting") for row in outcome.history] == [2, 2, 2]
    after_first = adapter.copy()
    after_first.model.load_state_dict(held[1])
    left = [f for i, f in enumerate(forget) if i not in (1, 3)]
    alone = {Stream.FORGET: [adapter.encode(r) for r in left], Stream.RETAIN: [adapter.encode(r) for r in retain]}
    from expunge.engine.objective import Objective, Sums

    def gradient(objective, plan):
        micro = objective.micro_batches(plan, 9999)[0]
        model = after_first.model
        losses = objective.losses(objective.views(model, micro, "cpu"), micro, objective.counts(plan), (1, 1), Sums())
        return torch.autograd.grad(sum(losses), list(model.parameters()))

    steering = Steering(Rest(), None, pairs=False, per_epoch=1, sharded=False)
    steering.resting = frozenset((1, 3))
    plan = steering.thin({"forget": [3, 0, 1, 2], "retain": [0, 1, 2, 3]})
    assert plan == {Stream.FORGET: [0, 2], Stream.RETAIN: [0, 1, 2, 3]}
    everything = {Stream.FORGET: [adapter.encode(r) for r in forget], Stream.RETAIN: alone[Stream.RETAIN]}
    ours = gradient(Objective(after_first, recipe, everything), plan)
    theirs = gradient(Objective(after_first, recipe, alone), {Stream.FORGET: [0, 1], Stream.RETAIN: [0, 1, 2, 3]})
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)

    everyone = recipe.model_copy(update={"control": Rest(who=(0, 1, 2, 3))})
    outcome, weights = run(adapter, everyone, forget, retain, observe=lambda n, m: held.append(copy.deepcopy(m.state_dict())))
    assert all(torch.equal(weights[k], held[-3][k]) for k in weights)  # nothing moved after the first look
    assert all(torch.isfinite(v).all() for v in resting.values())
    assert [row["loss"] != 0 for row in outcome.history] == [True, False, False]


def test_pairs_go_and_rest_together():
    steering = Steering(Rest(), None, pairs=True, per_epoch=2, sharded=False)
    assert steering.thin({"forget": [3, 1], "retain": [0, 2]}) == {Stream.FORGET: [3, 1], Stream.RETAIN: [3, 1]}
    steering.resting = frozenset((3,))
    assert steering.thin({"forget": [3, 1], "retain": [0, 2]}) == {Stream.FORGET: [1], Stream.RETAIN: [1]}
    assert steering.thin({"forget": [3], "retain": [0]}) == {}
    assert steering.thin({"retain": [0, 3]}) == {Stream.RETAIN: [0]}  # a turn of the retain set alone


def test_a_control_ends_the_run_and_says_why(adapter):
    recipe = build("graddiff", {"schedule": {**FIXED, "batch": 2, "epochs": 9}})
    recipe = recipe.model_copy(update={"control": Rest(stop_at=2, every=1.5)})
    outcome, _ = run(adapter, recipe, RECORDS[:4], RECORDS[4:])
    assert (outcome.steps, outcome.reason, outcome.reached) == (6, "control", True)
    assert outcome.sentence.startswith("Stopped after 6 steps: it was asked to (forget loss")
    assert [row.get("control.looks") for row in outcome.history] == [None, None, 1, None, None, 2]


def test_a_killed_run_goes_on_with_its_flags(adapter, tmp_path):
    recipe = build("graddiff", {"schedule": {**FIXED, "batch": 2, "epochs": 4}})
    recipe = recipe.model_copy(update={"control": Rest(who=(0,), stop_at=3)})
    ends = []
    for name, broken in (("whole", False), ("killed", True)):
        held = adapter.copy()
        examples = {Stream.FORGET: [held.encode(r) for r in RECORDS[:4]], Stream.RETAIN: [held.encode(r) for r in RECORDS[4:]]}

        def kill(step, _model, broken=broken):
            if broken and step == 5:
                raise KeyboardInterrupt

        options = {"folder": tmp_path / name, "resume": True}
        (tmp_path / name).mkdir()
        try:
            outcome = train(held, recipe, examples, Engine(checkpoint_every=3), observe=kill, **options)
        except KeyboardInterrupt:
            held = adapter.copy()
            outcome = train(held, recipe, examples, Engine(checkpoint_every=3), **options)
        ends.append((outcome.steps, outcome.sentence, outcome.model.state_dict()))
    assert ends[0][:2] == ends[1][:2]
    assert ends[0][0] == 6
    assert all(torch.equal(ends[0][2][k], ends[1][2][k]) for k in ends[0][2])


# ---- the two that there are


def test_thresholds_are_measured_on_unseen_records_and_stop_at_the_target_s_level(adapter):
    unseen = [Record(f"u{i}", text(*range(i, i + 8)), f"tell {i}") for i in range(4)]
    held = sight(adapter, **{Stream.VALIDATION: [adapter.encode(r) for r in unseen]})
    state: dict = {}
    control = Memorisation(n=3)
    assert control.reads == {Stream.VALIDATION}
    control.begin(held, state)
    assert state["ma"] < 0.4
    assert state["el"] < 0.4
    decision = control.look(held, state)
    assert (decision.stop, decision.seen) == ("", {"ma": 1.0})  # far above: no generation was needed
    fresh = adapter.copy()
    fresh.model = preset("llama-tiny", adapter.tokenizer, seed=3, context=48).eval()
    state |= {"ma": 0.5, "el": 0.5}
    decision = control.look(sight(fresh), state)
    assert "known no better than unseen text" in decision.stop
    assert set(decision.seen) == {"ma", "el"}
    with pytest.raises(InputError, match="none were given"):
        control.begin(sight(adapter), {})
    assert Memorisation(ma=0.1, el=0.1).reads == frozenset()


def test_patience_accepts_a_likelihood_that_no_longer_falls(adapter):
    control, state = Memorisation(ma=1.0, el=0.0, n=3, patience=2, margin=1.0), {}
    fresh = adapter.copy()
    fresh.model = preset("llama-tiny", adapter.tokenizer, seed=3, context=48).eval()
    held = sight(fresh)
    control.begin(held, state)
    assert [bool(control.look(held, state).stop) for _ in range(3)] == [False, False, True]
    eager, state = Memorisation(ma=1.0, el=0.0, n=3, patience=None, margin=1.0), {}
    eager.begin(held, state)
    assert not any(eager.look(held, state).stop for _ in range(4))


def test_flags_follow_what_is_said(adapter):
    """A model that knows all but two records: these two rest, and come back when they are known again."""
    known, strange = (
        RECORDS[:3],
        [Record("x", text(*range(8)), "tell", subject="x"), Record("y", text(9, 8, 7), "ask", subject="y")],
    )
    control, state = OverlapFlags(), {}
    held = sight(adapter, [*known, *strange])
    control.begin(held, state)
    decision = control.look(held, state)
    assert decision.resting == {3, 4}
    assert decision.stop == ""
    again = control.look(sight(adapter, known), state)
    assert again.resting == frozenset()
    none = control.look(sight(adapter, strange), state)
    assert none.resting == {0, 1}
    assert "continues none of the 2 forget examples truly" in none.stop
    assert OverlapFlags(bleu=0, f1=0).look(sight(adapter, strange), {**state, "ma": 0, "el": 0}).resting == frozenset()


def test_plain_text_is_continued_from_its_middle_and_spans_as_they_are(adapter):
    plain = adapter.encode(Record("p", text(*range(9))))
    asked = overlap.said(adapter, adapter.model, [(plain, 4, 8)], 4096)
    assert asked[0][1] == adapter.spoken(plain)[4:8]
    from expunge.methods.controls.overlap_flags import _asked

    assert _asked(adapter, plain, "all") == [(4, 9)]
    marked = adapter.encode(Record("m", text(1, 2, 3, 4), "say", spans=((3, 8),)))
    assert _asked(adapter, marked, "marked") == [(1, 3)]
    assert _asked(adapter, marked, "all") == [(0, 4)]
