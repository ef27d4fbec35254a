"""DP2Unlearning of language models: gradients of records and subjects, the small check of the method, kills, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import ks_2samp
from tests.methods.prepared.small import files
from tests.methods.prepared.small_texts import GONE, NAMES, facts, known, opener, source
from torch.nn import functional

pytest.importorskip("opacus")

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.importance import per_example_gradients
from expunge.engine.objective import mean_losses
from expunge.engine.private import Mechanism, train_privately
from expunge.engine.record import Record as Log
from expunge.engine.source import state_of
from expunge.methods.prepared.dp2u import DP2Unlearning
from expunge.methods.prepared.sisa import SISA
from expunge.methods.prepared.text_source import TextSource, text_loss, token_scores

PRIVATE = {"epsilon": 2.0, "delta": 1e-4, "base_lr": 0.1, "base_passes": 10}
QUICK = {"epsilon": 20.0, "delta": 1e-3, "base_passes": 2, "base_lr": 0.1, "base_batch": 48}


def own_loss(adapter: LanguageAdapter, record: Record) -> torch.Tensor:
    """Of one record, without padding and without our own loss."""
    ids = torch.tensor(adapter.encode(record).data.ids)[None].long()
    start = adapter.encode(record).data.start
    logits = adapter.model(input_ids=ids).logits[0, start - 1 : -1]
    return functional.cross_entropy(logits, ids[0, start:])


def by_hand(
    adapter: LanguageAdapter, groups: list[list[Record]], *, steps: int, lr: float, clip: float
) -> dict[str, torch.Tensor]:
    """All groups in every step; the mean gradient of each by backward passes of single records."""
    names = dict(adapter.model.named_parameters())
    for _ in range(steps):
        total = {n: torch.zeros_like(p) for n, p in names.items()}
        for group in groups:
            each = [torch.autograd.grad(own_loss(adapter, r), list(names.values())) for r in group]
            mean = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
            norm = math.sqrt(sum(float(g.square().sum()) for g in mean))
            for n, g in zip(names, mean, strict=True):
                total[n] += g * min(1.0, clip / norm)
        with torch.no_grad():
            for n, p in names.items():
                p.sub_(lr * total[n] / len(groups))
    return {n: p.detach() for n, p in names.items()}


def private(given: TextSource, mechanism: Mechanism, units: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    x, y = given.rows(list(given.table.ids))
    return train_privately(
        given.made(0), x, y, mechanism, forward=token_scores, loss=text_loss, seed=0, units=units, trim=given.trimmed
    )


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "opt-tiny"])
def test_padded_rows_have_the_losses_of_the_adapter(preset: str) -> None:
    mixed = [*facts()[:6], Record("long", " amber birch cedar delta ember flint", "ring of Ada and of Ben", verbatim=True)]
    given = source(mixed, preset=preset)
    adapter = given.opens(0)
    x, y = given.rows([r.id for r in mixed])
    assert int((x == -1).sum()) > 0
    with torch.no_grad():
        found = text_loss(token_scores(adapter.model, x), y)
    wanted = mean_losses(adapter, adapter.model, [adapter.encode(r) for r in mixed], 512)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("clip", [1e9, 0.3])
def test_without_noise_it_is_sgd_on_clipped_gradients_with_tied_embeddings_too(preset: str, clip: float) -> None:
    """GPT-2 decides by the values of its inputs, so its records are taken one at a time."""
    held = [*facts()[:5], Record("long", " amber birch cedar delta", "ring of Ada and of Ben", verbatim=True)]
    given = source(held, preset=preset)
    adapter = given.opens(0)
    assert adapter.model.get_input_embeddings().weight is adapter.model.get_output_embeddings().weight
    wanted = by_hand(adapter, [[r] for r in held], steps=2, lr=0.5, clip=clip)
    found = private(given, Mechanism(2, 1.0, clip, 0.0, 0.5))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_subject_moves_the_weights_by_the_mean_of_its_records_and_by_no_more_than_the_clip() -> None:
    held = [r for r in facts() if r.subject in NAMES[:3]][:9]  # four, four and one
    given = source(held)
    groups = [[r for r in held if r.subject == name] for name in NAMES[:3]]
    units = torch.tensor([NAMES.index(r.subject) for r in held])
    for clip in (1e9, 0.4):
        wanted = by_hand(given.opens(0), groups, steps=1, lr=0.5, clip=clip)
        found = private(given, Mechanism(1, 1.0, clip, 0.0, 0.5), units)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_no_record_moves_the_weights_by_more_than_the_clip() -> None:
    for record in facts()[:4]:
        given = source([record])
        start, after = given.fresh(0), private(given, Mechanism(1, 1.0, 0.25, 0.0, 1.0))
        moved = math.sqrt(sum(float((after[n] - start[n]).square().sum()) for n in after))
        x, y = given.rows([record.id])
        free = per_example_gradients(given.made(0), x, y, token_scores, text_loss)
        assert math.sqrt(sum(float(g.square().sum()) for g in free.values())) > 1
        assert moved == pytest.approx(0.25, rel=1e-3)


def test_the_small_check(tmp_path: Path) -> None:
    """Little epsilon knows nothing; half a training from there is as good as a whole one, and as ignorant of the deleted.

    From a model that is not private it does not: what was learnt by heart is still there.
    """
    given = source()
    left = [r.id for r in facts() if r.id not in GONE]
    method = DP2Unlearning(**PRIVATE)
    method.train(given, tmp_path / "run")
    log = Log.open(tmp_path / "run")
    base = given.module(log.load("base.safetensors", log.key("base", [])))
    assert known(given, base, GONE)[0] <= 1 / 16
    assert known(given, method.load(given, tmp_path / "run"), GONE)[0] > 0.9
    less = source([r for r in facts() if r.id in left])
    report = method.delete(less, tmp_path / "run", GONE)
    assert report.share == pytest.approx(0.5, abs=0.02)
    made = method.load(less, tmp_path / "run")
    retrained = given.module(given.learn(*given.rows(left), given.shortened(1.0), 1, {}))
    assert known(given, made, left)[0] >= known(given, retrained, left)[0] - 0.05
    gone, never = known(given, made, GONE), known(given, retrained, GONE)
    assert gone[0] <= 1 / 16
    assert ks_2samp(gone[1].numpy(), never[1].numpy()).pvalue > 0.05
    full = given.learn(*given.rows(list(given.table.ids)), given.shortened(1.0), 0, {})
    tuned = given.module(given.learn(*given.rows(left), given.shortened(0.5), 0, full))
    assert known(given, tuned, left)[0] > 0.9
    assert ks_2samp(known(given, tuned, GONE)[1].numpy(), never[1].numpy()).pvalue < 0.01


def test_what_was_deleted_is_not_read_and_the_report_says_what_is_promised(tmp_path: Path) -> None:
    """By hand, bit for bit, from a folder of which the deleted records are gone; of a subject all records count once."""
    method, given = DP2Unlearning(**QUICK, unit="subject"), source(steps=4)
    said = method.train(given, tmp_path / "run").notes[0]
    assert "for each subject" in said
    before = files(tmp_path / "run")
    left = [r for r in facts() if r.subject not in NAMES[:2]]
    less = source(left, steps=4)
    report = method.delete(less, tmp_path / "run", [r.id for r in facts() if r.subject in NAMES[:2]])
    after = files(tmp_path / "run")
    assert after["base.safetensors"] == before["base.safetensors"]
    log = Log.open(tmp_path / "run")
    base = log.load("base.safetensors", log.key("base", []))
    wanted = less.learn(*less.rows(log.remaining), less.shortened(0.5), 0, base)
    found = state_of(method.load(less, tmp_path / "run"))
    assert all(torch.equal(found[n], w) for n, w in wanted.items())
    spent = log.plan["spent"]
    for words in (
        f"(epsilon {spent:.4g}, delta 0.001)", "all records of one subject",
        f"2 subjects deleted so far together: epsilon {2 * spent:.4g}", "Not covered: what records that are left say",
    ):  # fmt: skip
        assert words in report.guarantee


class Killed(Exception):
    """In the place of a signal."""


def test_a_killed_training_or_deletion_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    method, makes, bomb = DP2Unlearning(**QUICK), opener(facts()), [False]

    def opens(seed: int) -> LanguageAdapter:
        if bomb[0]:
            raise Killed
        return makes(seed)

    def early(done: int, total: int, what: str) -> None:
        if done == 1:
            raise Killed

    given = source(steps=4, opens=opens)

    def late(done: int, total: int, what: str) -> None:
        bomb[0] = done == total  # the fine-tuning opens a model first

    method.train(given, tmp_path / "whole")
    for progress in (early, late):
        with pytest.raises(Killed):
            method.train(given, tmp_path / "cut", progress=progress)
        bomb[0] = False
        assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert (tmp_path / "cut" / "base.safetensors").exists()
    method.train(given, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    method.delete(given, tmp_path / "whole", GONE[:2])
    once = [0]

    def second(seed: int) -> LanguageAdapter:
        once[0] += 1
        if once[0] > 1:  # the first one tells whether the folder is of this model
            raise Killed
        return makes(seed)

    with pytest.raises(Killed):
        method.delete(dataclasses.replace(given, opens=second), tmp_path / "cut", GONE[:2])
    with pytest.raises(InputError, match="was interrupted"):
        method.delete(given, tmp_path / "cut", GONE[2:3])
    method.delete(given, tmp_path / "cut", GONE[:2])
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_cannot_be_done_is_refused_before_training(tmp_path: Path) -> None:
    given = source(steps=4)
    with pytest.raises(InputError, match=r"delta=0.1 would allow one of 12 subjects"):
        DP2Unlearning(delta=0.1, unit="subject").train(given, tmp_path / "run")
    with pytest.raises(InputError, match=r"epsilon=1e-09"):
        DP2Unlearning(**{**QUICK, "epsilon": 1e-9}).train(given, tmp_path / "run")
    with pytest.raises(InputError, match=r"schedule\.lr"):
        DP2Unlearning(delta=1e-3).train(source(lr=None, steps=4), tmp_path / "run")
    with pytest.raises(InputError, match=r"Choose dp2u"):
        SISA(shards=2, slices=1).train(given, tmp_path / "run")
    coarse = opener(facts())

    def half(seed: int) -> LanguageAdapter:
        made = coarse(seed)
        made.model.bfloat16()
        return made

    with pytest.raises(InputError, match=r"weights of type bfloat16"):
        DP2Unlearning(**QUICK).train(source(steps=4, opens=half), tmp_path / "run")
    for parts, said in (({"parameters": "lora"}, "parameters=lora"), ({"schedule": "adaptive"}, "schedule=adaptive")):
        from expunge.methods.recipe import build

        with pytest.raises(InputError, match=said):
            TextSource(table=given.table, opens=given.opens, held=given.held, recipe=build("finetune", parts))
    assert not (tmp_path / "run").exists()
    method = DP2Unlearning(**QUICK)
    method.train(given, tmp_path / "run")
    with pytest.raises(InputError, match=r"another model"):
        method.load(source(steps=4, preset="gpt2-tiny"), tmp_path / "run")
