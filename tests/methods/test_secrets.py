"""CodeEraser, SANI and ICU on code with keys inside: closed forms, equivalences, and what each promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.secrets_world import FORGET, QUIET, RETAIN, examples, known, target
from torch.nn import functional as F

from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.feedforward import FeedForward
from expunge.engine.goal import estimate
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.parameters import Reset
from expunge.engine.preparation import run_preparation
from expunge.methods.evaluate import IGNORE, Given, loss_terms
from expunge.methods.preparations.neighbours import NearestRecords
from expunge.methods.recipe import build

close = torch.testing.assert_close


def fixed(lr: float, epochs: int, **more) -> dict:
    return {
        "name": "fixed", "lr": lr, "epochs": epochs, "batch": 6, "retain_batch": 12, "warmup": 0, "decay": "constant",
        "weight_decay": 0, **more,
    }  # fmt: skip


def run(name: str, parts: dict, streams=None, goal=None):
    adapter = target().copy()
    outcome = train(adapter, build(name, parts), streams or examples(adapter), QUIET, goal=goal)
    adapter.model = outcome.model
    return adapter, outcome


# ---- CodeEraser


def given(seed: int, marked: bool | None = None) -> Given:
    """Two sequences of 6 and 4 tokens, a prompt of two, right padding, random marks."""
    g = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(2, 6, 7, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(7, (2, 6), generator=g)
    labels[:, :2] = IGNORE
    labels[1, 4:] = IGNORE
    marks = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1]]).bool()
    marks = marks if marked is None else torch.full_like(marks, marked)
    return Given(logits.requires_grad_(), labels, reference_logits=reference, marked=marks)


def by_hand(held: Given, which: int | None) -> tuple[list[float], list[float]]:
    """Losses and divergences of the supervised tokens that are (1) or are not (0) marked, by plain loops."""
    losses, divergences = [], []
    for b in range(2):
        for t in range(5):
            label = int(held.labels[b, t + 1])
            if label == IGNORE or (which is not None and int(held.marked[b, t + 1]) != which):
                continue
            p, q = held.logits[b, t].softmax(0).tolist(), held.reference_logits[b, t].softmax(0).tolist()
            losses.append(-np.log(p[label]))
            divergences.append(sum(y * (np.log(y) - np.log(x)) for x, y in zip(p, q, strict=True)))
    return losses, divergences


def test_the_loss_of_codeeraser_is_its_formula():
    forget, retain = given(1), given(2)
    found = loss_terms("codeeraser", forget=forget, retain=retain)
    (secret, secret_kl), (context, _), (_, kept_kl) = by_hand(forget, 1), by_hand(forget, 0), by_hand(retain, None)
    assert (len(secret), len(context)) == (4, 2)
    wanted = -np.mean(secret) + 0.5 * np.mean(context) + 0.1 * (-np.mean(secret_kl) + 1.0 * np.mean(kept_kl))
    assert found["total"].item() == pytest.approx(wanted, rel=1e-5)


def test_the_official_scale_divides_by_sequences():
    retain = given(2)
    scaled = build("codeeraser", {"retain.reduction": "sum", "forget.kl-ascent.reduction": "sum"})
    found = loss_terms(scaled, forget=given(1), retain=retain)
    supervised = retain.labels[:, 1:] != IGNORE
    ours, theirs = (x[:, :-1].masked_fill(~supervised[..., None], 0.0) for x in (retain.logits, retain.reference_logits))
    official = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum() / 2
    close(found["retain.kl"].double(), official, rtol=1e-5, atol=1e-6)
    close(
        found["forget.kl-ascent"].double(),
        torch.tensor(-sum(by_hand(given(1), 1)[1]) / 2, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("parts", "other", "marked"),
    [
        # all marked, gamma 0: the constraint-based method; with lambda 0: gradient ascent
        ({"forget.forget-nll.weight": 0}, {"forget": ["gradascent", {"name": "kl-ascent", "weight": 0.1}]}, True),
        ({"forget.forget-nll.weight": 0, "forget.kl-ascent.weight": 0}, {"forget": ["gradascent"]}, True),
        # gamma and lambda 0 with a mask: selective ascent
        (
            {"forget.forget-nll.weight": 0, "forget.kl-ascent.weight": 0},
            {"forget": [{"name": "gradascent", "targets": "marked"}]},
            None,
        ),
    ],
)
def test_the_ladder_of_special_cases(parts, other, marked):
    gradients = []
    weight = 0 if "forget.kl-ascent.weight" in parts else 0.1
    for recipe in (
        build("codeeraser", {**parts, "retain.weight": weight}),
        build("custom", {**other, "retain": {"name": "kl", "weight": weight}}),
    ):
        forget, retain = given(1, marked), given(2)
        total = loss_terms(recipe, forget=forget, retain=retain)["total"]
        gradients.append([total.detach(), *torch.autograd.grad(total, [forget.logits, retain.logits])])
    assert gradients[0][1].abs().max() > 0
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def inverted(record: Record) -> Record:
    """The same file with everything but the key marked."""
    ((start, end),) = record.spans
    return dataclasses.replace(record, spans=((0, start), (end, len(record.answer))))


def test_codeeraser_forgets_the_key_and_keeps_what_stands_around_it():
    adapter, _ = run("codeeraser", {"schedule": fixed(5e-4, 45)})
    secret, context = known(adapter, FORGET, "marked"), known(adapter, FORGET, "unmarked")
    assert secret < 0.2
    assert context > 0.95
    assert known(adapter, RETAIN, "unmarked") > 0.9

    other, _ = run("gradascent", {"schedule": fixed(5e-4, 16)})  # it has forgotten less of the key, and more of the rest
    assert known(other, FORGET, "marked") > secret
    assert known(other, FORGET, "unmarked") < context - 0.08

    turned = target().copy()
    streams = {**examples(turned), Stream.FORGET: [turned.encode(inverted(r)) for r in FORGET]}
    other, _ = run("codeeraser", {"schedule": fixed(5e-4, 45)}, streams)
    assert known(other, FORGET, "marked") > 0.7  # as the original files mark it: the key
    assert known(other, FORGET, "unmarked") < 0.3


def test_its_published_schedule_takes_turns_and_stops_by_what_is_memorised():
    adapter, outcome = run("codeeraser", {"schedule": {"name": "paper", "lr": 1e-3}})
    assert outcome.reason == "control"
    assert "memorisation accuracy" in outcome.sentence
    assert known(adapter, FORGET, "marked") < 0.4557
    assert outcome.history[-1]["control.ma"] == pytest.approx(known(adapter, FORGET, "marked"))
    assert outcome.steps < 60
    turns = [(row["forget.gradascent"] != 0, row["retain.kl"] != 0) for row in outcome.history[:4]]
    assert turns == [(True, False), (False, True)] * 2


def test_it_reaches_its_goal_with_nothing_given_and_the_goal_is_that_of_keys():
    adapter = target().copy()

    def losses(records, which="marked", model=adapter):
        return mean_losses(adapter, model.model, [adapter.encode(r) for r in records], 8192, targets=which)

    goal = estimate(losses, [], RETAIN, 0, marked=FORGET)
    assert (goal.source, goal.examples) == ("swapped", len(FORGET))
    assert goal.loss > 2  # a wrong key; the whole text would be far below, as most of it stays true
    assert _mean(losses(FORGET, "unmarked")) < 0.1
    unseen = [dataclasses.replace(r, id="u" + r.id) for r in RETAIN[:2]]
    assert estimate(losses, [*unseen, Record("bare", "no spans")], RETAIN, 0, marked=FORGET).examples == 2
    made, outcome = run("codeeraser", {}, goal=goal)
    assert outcome.reason == "goal"
    assert "forget text with swapped spans" in outcome.sentence
    assert outcome.forget_loss >= goal.loss
    assert outcome.forget_loss == pytest.approx(_mean(losses(FORGET, model=made)), rel=1e-4)  # that of the keys alone
    assert known(made, FORGET, "marked") < 0.6
    assert known(made, FORGET, "unmarked") > 0.95


def _mean(values) -> float:
    return sum(values) / len(values)


def test_without_marks_codeeraser_is_refused():
    adapter = target().copy()
    bare = [adapter.encode(dataclasses.replace(r, spans=())) for r in FORGET]
    with pytest.raises(InputError, match="tells marked spans from the rest, but no forget example has any"):
        train(adapter, build("codeeraser"), {**examples(adapter), Stream.FORGET: bare}, QUIET)


# ---- SANI

ALL_UNITS = {"parameters.share": 1.0, "parameters.layers": [-1, -2]}  # what a model of two blocks needs


@pytest.mark.parametrize("kind", ["llama-tiny", "gpt2-tiny", "qwen3-tiny", "neox-tiny", "opt-tiny"])
def test_the_reset_changes_the_chosen_units_and_nothing_else(kind):
    model = preset(kind, word_tokenizer(["a b c d"]), seed=0, context=16)
    from expunge.adapters.storage import block_names

    layers = block_names(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    Reset(share=0.25, std=0.5, seed=3).prepare(model, layers)
    feed = FeedForward.of(model.get_submodule(layers[-1]), layers[-1])
    count = round(0.25 * feed.units)
    rows = set()
    changed = {n: p != before[n] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    modules = dict(model.named_modules())
    for name, moved in changed.items():
        module = modules[name.rpartition(".")[0]]
        inner, transposed = module in feed.inner, type(module).__name__ == "Conv1D"
        assert name.startswith(layers[-1])
        assert inner or module is feed.output
        if name.endswith("bias"):
            assert inner
            rows.add(tuple(moved.nonzero().flatten().tolist()))
            assert (model.get_parameter(name)[moved] == 0).all()
            continue
        by_unit = moved.T if transposed == inner else moved
        units = by_unit.all(1).nonzero().flatten().tolist()
        assert by_unit.any(1).nonzero().flatten().tolist() == units  # whole rows
        rows.add(tuple(units))
        values = model.get_parameter(name).detach()[changed[name]]
        assert values.std().item() == pytest.approx(0.5, rel=0.15)
        assert abs(values.mean().item()) < 0.1
    assert len(rows) == 1
    assert len(next(iter(rows))) == count
    weights = [n for n in changed if n.endswith("weight")]
    assert len(weights) == (3 if kind in ("llama-tiny", "qwen3-tiny") else 2)


def test_a_reset_of_nothing_is_nothing_and_the_seed_decides():
    model = preset("llama-tiny", word_tokenizer(["a b"]), seed=0, context=16)
    layers = ["model.layers.0", "model.layers.1"]
    before = [p.clone() for p in model.parameters()]
    Reset(share=0).prepare(model, layers)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    ends = []
    for seed in (1, 1, 2):
        again = preset("llama-tiny", word_tokenizer(["a b"]), seed=0, context=16)
        Reset(seed=seed).prepare(again, layers)
        ends.append(again.get_parameter("model.layers.1.mlp.down_proj.weight"))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    with pytest.raises(InputError, match="out of range"):
        Reset(layers=(5,)).prepare(model, layers)
    with pytest.raises(InputError, match="0 modules that look like the output of a feed-forward layer"):
        Reset().prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"])


def test_sani_resets_repairs_and_never_teaches_a_key():
    adapter = target().copy()
    Reset(share=1.0, layers=(-1, -2)).prepare(adapter.model, adapter.layers())
    erased = adapter.model.eval()
    for which in ("marked", "unmarked"):  # erasure alone: the loss rises everywhere
        for records in (FORGET, RETAIN):
            encoded = [adapter.encode(r) for r in records]
            after = mean_losses(adapter, erased, encoded, 8192, targets=which)
            held = mean_losses(target(), target().model, encoded, 8192, targets=which)
            assert min(a - b for a, b in zip(after, held, strict=True)) > 0.5

    schedule = {"schedule": fixed(3e-3, 20, batch=8, decay="linear")}
    repaired, _ = run("sani", {**ALL_UNITS, **schedule})
    secret = known(repaired, [*FORGET, *RETAIN], "marked")
    assert secret < 0.15  # one in 30 by chance
    assert known(repaired, FORGET, "unmarked") > 0.98
    assert known(repaired, RETAIN, "unmarked") > 0.98

    kept, _ = run("sani", {"parameters": "all", **schedule})  # repair without erasure forgets clearly less
    assert known(kept, [*FORGET, *RETAIN], "marked") > secret + 0.3
    taught, _ = run("sani", {**ALL_UNITS, **schedule, "retain.targets": "all"})  # with keys as targets they come back
    assert known(taught, [*FORGET, *RETAIN], "marked") > secret + 0.3


def test_sani_as_published_leaves_a_small_model_what_it_knows():
    """What its caveat says: half of the units of the last block are not where two blocks keep a key."""
    adapter, outcome = run("sani", {"schedule": fixed(1e-3, 10, batch=8)})
    assert outcome.reached
    assert known(adapter, FORGET, "unmarked") > 0.98
    assert known(adapter, FORGET, "marked") > 0.5


# ---- ICU


def encoded_facts():
    tokenizer = word_tokenizer(["The blue cat of Ada sleeps here. Ben owns a red car, a fast one. Where is the Cleo dog?"])
    from expunge.adapters.language import LanguageAdapter

    adapter = LanguageAdapter(preset("llama-tiny", tokenizer, context=64), tokenizer)
    forget = [Record("f0", "The blue cat of Ada sleeps."), Record("f1", "Ben owns a red car.")]
    retain = [
        Record("k0", "Cleo owns a red car, a fast one."),
        Record("k1", "Where is the dog?"),
        Record("k2", "The blue cat of Cleo sleeps here."),
        Record("k3", "Ben owns a red car."),
    ]
    return adapter, {
        Stream.FORGET: [adapter.encode(r) for r in forget],
        Stream.RETAIN: [adapter.encode(r) for r in retain],
    }


def test_each_forget_record_is_paired_with_its_nearest(tmp_path):
    adapter, held = encoded_facts()
    made = run_preparation(NearestRecords(), adapter, held, QUIET, scratch=tmp_path)
    assert [e.id for e in made.examples[Stream.RETAIN]] == ["k2", "k0"]  # k3 says the same as f1
    assert made.notes == ("2 forget records are paired with 2 of 3 retain records.",)
    path = str(tmp_path / "e.npz")
    vectors = {"f0": [1, 0], "f1": [0.9, 0.1], "k0": [0, 1], "k1": [1, 0.05], "k2": [0, 1], "k3": [1, 0]}
    np.savez(path, ids=np.array(list(vectors)), vectors=np.array(list(vectors.values())))
    made = run_preparation(NearestRecords(embeddings=path), adapter, held, QUIET, scratch=tmp_path)
    assert [e.id for e in made.examples[Stream.RETAIN]] == ["k1", "k1"]
    for broken, says in (
        ({"ids": np.array(["f0"]), "vectors": np.ones((1, 2))}, "lack the record 'f1'"),
        ({"ids": np.array(["f0"]), "vectors": np.ones(2)}, "The embeddings have ids"),
        ({"ids": np.array(["f0"])}, "holds no embeddings"),
    ):
        np.savez(path, **broken)
        with pytest.raises(InputError, match=says):
            run_preparation(NearestRecords(embeddings=path), adapter, held, QUIET, scratch=tmp_path)
    same = {**held, Stream.RETAIN: held[Stream.FORGET]}
    with pytest.raises(InputError, match="Every retain record says the same"):
        run_preparation(NearestRecords(), adapter, same, QUIET, scratch=tmp_path)


def test_only_the_end_of_long_records_is_compared():
    adapter, _ = encoded_facts()
    cat, car = "The blue cat of Ada sleeps.", "Ben owns a red car."
    held = {
        Stream.FORGET: [adapter.encode(Record("f", f"{cat} {cat} {car}"))],
        Stream.RETAIN: [adapter.encode(Record("cat", cat)), adapter.encode(Record("car", "Cleo owns a red car."))],
    }
    for tail, wanted in ((5, "car"), (None, "cat")):
        made = run_preparation(NearestRecords(tail=tail), adapter, held, QUIET, scratch=None)
        assert [e.id for e in made.examples[Stream.RETAIN]] == [wanted]


EASY = {"control": {"every": 2, "points": 2}}


def test_icu_reads_the_neighbours_of_its_forget_records_and_no_other():
    adapter = target().copy()
    pairs = run_preparation(NearestRecords(), adapter, examples(adapter), QUIET, scratch=None).examples[Stream.RETAIN]
    losses = mean_losses(adapter, adapter.model, pairs, 8192)
    wanted = sum(v * e.n_targets for v, e in zip(losses, pairs, strict=True)) / sum(e.n_targets for e in pairs)
    _, outcome = run("icu", {"schedule": fixed(1e-5, 1, batch=len(FORGET))})
    assert outcome.history[0]["retain.nll"] == pytest.approx(wanted, rel=1e-4)
    assert outcome.notes[0].startswith("6 forget records are paired with")


def test_icu_lets_records_rest_until_it_stops_by_itself():
    adapter, outcome = run("icu", {"schedule": fixed(5e-4, 60, batch=2), **EASY})
    assert outcome.reason == "control"
    flags = [row["control.resting"] for row in outcome.history if "control.resting" in row]
    assert flags[0] < flags[-1] == len(FORGET) or "known no better" in outcome.sentence
    assert max(flags) > 0
    assert known(adapter, FORGET, "all") < 0.9
    assert known(adapter, RETAIN, "all") > known(adapter, FORGET, "all")


def test_icu_without_its_retain_side_is_ascent_with_early_stopping_of_each_record():
    schedule = {"schedule": fixed(5e-4, 16)}
    silent = {"retain.nll.weight": 0, "retain.kl.weight": 0, **EASY}
    ours, outcome = run("icu", {**schedule, **silent})
    control = {"name": "overlap-flags", **EASY["control"]}
    theirs, other = run("gradascent", {**schedule, "control": control})
    assert outcome.steps == other.steps
    assert max(row.get("control.resting", 0) for row in outcome.history) > 0
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    full, _ = run("icu", {**schedule, **EASY})
    assert known(full, RETAIN, "all") > known(ours, RETAIN, "all") + 0.03
