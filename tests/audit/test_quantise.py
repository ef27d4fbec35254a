"""Rounding of weights: against a loop over numbers, against its own bounds, and on real models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hyp
from tests.world import World
from torch import nn

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.quantise import decode, encode, identical_bins, quantised
from expunge.core.errors import InputError


def by_hand(matrix: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """The definition, one number at a time, in float64."""
    top = 2 ** (bits - 1) - 1
    out = np.zeros_like(matrix)
    size = group or matrix.shape[1]
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], size):
            part = matrix[row, start : start + size]
            largest = max(abs(x) for x in part)
            for at, x in enumerate(part):
                out[row, start + at] = 0.0 if largest == 0 else round(x / (largest / top)) * (largest / top)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 1, 4, 7, 100])
def test_rounding_equals_its_definition(bits: int, group: int | None) -> None:
    matrix = np.random.default_rng(bits).normal(size=(5, 18)).astype(np.float32)
    matrix[2] = 0
    codes, step = encode(torch.from_numpy(matrix), bits, group)
    expected = by_hand(matrix.astype(np.float64), bits, group)
    assert decode(codes, step, group).numpy() == pytest.approx(expected, abs=1e-5)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1  # the largest weight of a group is met exactly
    assert codes.dtype == torch.int8


@settings(max_examples=50, deadline=None)
@given(hyp.integers(0, 10_000), hyp.integers(2, 8), hyp.sampled_from([None, 3, 8]))
def test_no_weight_moves_by_more_than_half_a_step_and_rounding_twice_changes_nothing(
    seed: int, bits: int, group: int | None
) -> None:
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 16)).astype(np.float32))
    codes, step = encode(matrix, bits, group)
    rounded = decode(codes, step, group)
    half = step.repeat_interleave(group or 16, dim=1)[:, :16] / 2
    assert bool(((rounded - matrix).abs() <= half * (1 + 1e-5)).all())
    again, _ = encode(rounded, bits, group)
    assert torch.equal(again, codes)


def test_updates_smaller_than_half_a_step_vanish() -> None:
    """Weights on the grid, moved by less than half a step (scale kept): the rounded model is the rounded original."""
    rng = np.random.default_rng(0)
    step = 0.01
    grid = torch.from_numpy((rng.integers(-6, 7, size=(8, 32)) * step).astype(np.float32))
    grid[:, 0] = 7 * step  # the largest weight fixes the scale
    move = torch.from_numpy(rng.uniform(-0.49 * step, 0.49 * step, size=(8, 32)).astype(np.float32))
    move[:, 0] = 0
    assert torch.equal(encode(grid + move, 4)[0], encode(grid, 4)[0])
    assert torch.allclose(decode(*encode(grid + move, 4)), grid, atol=1e-7)
    larger = torch.where(move != 0, move.sign() * 0.51 * step, move)
    changed = encode(grid + larger, 4)[0] != encode(grid, 4)[0]
    assert bool(changed[:, 1:].all())


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


@pytest.fixture(params=["llama-tiny", "gpt2-tiny"])
def adapter(request: pytest.FixtureRequest) -> LanguageAdapter:
    tokenizer = word_tokenizer(["Question: who? Answer: nobody, never, at all."])
    return LanguageAdapter(build(request.param, tokenizer, seed=1, context=32), tokenizer)


@pytest.mark.parametrize("group", [None, 16])
def test_linear_weights_are_rounded_on_a_copy_and_nothing_else(adapter: LanguageAdapter, group: int | None) -> None:
    before = {n: p.detach().clone() for n, p in adapter.model.named_parameters()}
    rounded = quantised(adapter, 4, group)
    assert all(torch.equal(p, before[n]) for n, p in adapter.model.named_parameters())
    after = dict(rounded.model.named_parameters())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    tied = {n for n, w in linears(adapter.model).items() if w is adapter.model.get_input_embeddings().weight}
    expected = {f"{n}.weight" for n in linears(adapter.model) if n not in tied}
    assert changed == expected
    assert tied  # the presets share the head with the embedding, which must not be touched
    for name, weight in linears(rounded.model).items():
        if name in tied:
            continue
        transposed = type(rounded.model.get_submodule(name)).__name__ == "Conv1D"
        own, was = (w.t() if transposed else w for w in (weight, before[f"{name}.weight"]))
        assert own.detach().numpy() == pytest.approx(by_hand(was.double().numpy(), 4, group), abs=1e-5)
        assert own.shape[1] == was.shape[1]
        distinct = max(len(torch.unique(row)) for row in own.detach())
        assert distinct <= 15 if group is None else distinct <= 15 * (own.shape[1] // group)


def test_embeddings_are_rounded_on_request(adapter: LanguageAdapter) -> None:
    rounded = quantised(adapter, 3, embeddings=True)
    table, was = rounded.model.get_input_embeddings().weight, adapter.model.get_input_embeddings().weight
    assert max(len(torch.unique(row)) for row in table.detach()) <= 7
    assert not torch.equal(table, was)
    assert rounded.model.get_output_embeddings().weight is table  # still shared


def test_more_bits_are_nearer_and_identical_bins_says_why(adapter: LanguageAdapter) -> None:
    def distance(bits: int) -> float:
        pairs = zip(adapter.model.parameters(), quantised(adapter, bits).model.parameters(), strict=True)
        return sum(float((a - b).detach().pow(2).sum()) for a, b in pairs)

    assert distance(8) < distance(4) < distance(2)
    near = adapter.copy()
    with torch.no_grad():
        for weight in linears(near.model).values():
            weight.add_(1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert identical_bins(adapter, adapter, 4) == 1.0
    shares = [identical_bins(adapter, near, bits) for bits in (8, 4, 2)]
    assert shares[0] < shares[1] <= shares[2] <= 1
    assert shares[1] > 0.98


def test_a_lora_is_merged_before_rounding(adapter: LanguageAdapter) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(adapter.model), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    held = LanguageAdapter(wrapped, adapter.tokenizer)
    rounded = quantised(held, 8)
    assert not any("lora" in n for n, _ in rounded.model.named_parameters())
    assert any("lora" in n for n, _ in held.model.named_parameters())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    names = [n for n, w in linears(merged).items() if w is not merged.get_input_embeddings().weight]
    for name in names:
        difference = (rounded.model.get_submodule(name).weight - merged.get_submodule(name).weight).abs().max()
        assert 0 < float(difference) <= float(merged.get_submodule(name).weight.abs().max()) / 127 / 2 * 1.001


def test_out_of_range_is_refused(adapter: LanguageAdapter) -> None:
    for bits in (1, 9, 16):
        with pytest.raises(InputError, match="2 to 8 bits"):
            quantised(adapter, bits)
    with pytest.raises(InputError, match="at least one"):
        quantised(adapter, 4, 0)
    bare = adapter.copy()
    bare.model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))
    with pytest.raises(InputError, match="no linear weight"):
        identical_bins(bare, bare, 4)


def test_a_memorised_fact_survives_eight_bits(people_world: World) -> None:
    target, retrained = people_world.target(), people_world.retrained()
    forget = people_world.split.forget
    assert people_world.loss(quantised(target, 8), forget) < people_world.loss(target, forget) + 0.05
    assert people_world.loss(quantised(retrained, 8), forget) > 1.0  # the control must not learn by being rounded
