"""Second moments of the inputs of linear modules, and the directions that they leave free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.supervised import ClassifierAdapter
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.rows import table
from expunge.engine import covariance
from expunge.engine.covariance import Moment, input_moments, linear_weights, null_space

TEXTS = [Record(str(i), "far " * (i + 1) + "away", "Where is it " + "now " * (i % 3) + "?") for i in range(7)]


def language(name: str, **options) -> LanguageAdapter:
    tokenizer = word_tokenizer([r.prompt + " " + r.answer for r in TEXTS] + ["Question: Answer:"])
    return LanguageAdapter(preset(name, tokenizer, seed=1), tokenizer, **options)


def one_by_one(adapter, module: str, examples) -> tuple[torch.Tensor, int]:
    """By the model itself, without batches, padding or packing."""
    rows: list[torch.Tensor] = []
    handle = adapter.model.get_submodule(module).register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0][0]))
    with torch.no_grad():
        for e in examples:
            adapter.model(input_ids=torch.tensor([list(map(int, e.data.ids))]))
    handle.remove()
    found = torch.cat(rows).double()
    return found.T @ found, len(found)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama-tiny", ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")),
        ("gpt2-tiny", ("transformer.h.1.mlp.c_proj",)),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_units", [64, 4096])
def test_every_real_token_counts_once_whatever_the_batches_are(name, modules, packed, max_units) -> None:
    adapter = language(name, packed=packed)
    examples = [adapter.encode(r) for r in TEXTS]
    found = input_moments(adapter, adapter.model, modules, examples, max_units=max_units)
    for module in modules:
        total, count = one_by_one(adapter, module, examples)
        assert found[module].count == count == sum(e.size for e in examples)
        assert found[module].total.dtype == torch.float64
        torch.testing.assert_close(found[module].total, total, rtol=1e-4, atol=1e-5)


def test_the_head_is_reached_too_and_a_limit_draws_by_the_seed() -> None:
    adapter = language("llama-tiny")
    examples = [adapter.encode(r) for r in TEXTS]
    assert input_moments(adapter, adapter.model, ["lm_head"], examples, max_units=512)["lm_head"].count > 0
    module = "model.layers.0.mlp.down_proj"
    totals = [
        input_moments(adapter, adapter.model, [module], examples, max_units=512, limit=3, seed=s)[module].total for s in (0, 0, 1)
    ]
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


def test_rows_of_a_table_have_moments_too() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    adapter = ClassifierAdapter(model, ("a", "b", "c"))
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    examples = [adapter.encode(r) for r in table(x.numpy(), [i % 3 for i in range(9)]).rows()]
    found = input_moments(adapter, model, ["0", "2"], examples, max_units=20)
    torch.testing.assert_close(found["0"].mean(), (x.T @ x / 9).double(), rtol=1e-5, atol=1e-6)
    hidden = model[:2](x).detach()
    torch.testing.assert_close(found["2"].mean(), (hidden.T @ hidden / 9).double(), rtol=1e-5, atol=1e-6)


def test_moments_stream() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = Moment(torch.zeros(6, 6, dtype=torch.float64))
    for part in x.split(7):
        moment.add(part)
    torch.testing.assert_close(moment.mean(), x.T @ x / 50)


@pytest.mark.parametrize("used", [2, 9])  # either side is the smaller one
def test_the_projector_is_that_of_the_directions_that_hold_nothing(used: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, used, generator=g, dtype=torch.float64) @ torch.randn(used, 12, generator=g, dtype=torch.float64)
    space = null_space(x.T @ x / 40, threshold=0)
    assert space.rank == 12 - used
    assert space.basis.shape[1] == min(used, 12 - used)
    p = space.project(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.T)
    assert float(p.trace()) == pytest.approx(12 - used)
    assert (x @ p).abs().max() < 1e-9
    g_w = torch.randn(4, 12, generator=g)
    assert space.project(g_w).dtype == torch.float32
    torch.testing.assert_close(space.project(g_w), g_w @ p.float())


def test_a_larger_threshold_or_share_of_energy_frees_more() -> None:
    moment = torch.diag(torch.tensor([0.001, 0.01, 0.1, 1.0, 8.889], dtype=torch.float64))
    assert [null_space(moment, threshold=t).rank for t in (0.001, 0.05, 0.5, 100)] == [1, 2, 3, 5]
    assert [null_space(moment, energy=e).rank for e in (0.0002, 0.0012, 0.02, 0.12, 1.0)] == [1, 2, 3, 4, 5]
    assert null_space(moment, threshold=0.05).edge == pytest.approx(0.01)


def test_what_leaves_nothing_or_does_not_fit_is_refused(monkeypatch) -> None:
    with pytest.raises(InputError, match=r"leaves no direction free: the smallest of 3 eigenvalues is 1\.00e\+00"):
        null_space(torch.eye(3, dtype=torch.float64), threshold=0.5)
    with pytest.raises(InputError, match="Give one of both"):
        null_space(torch.eye(3), threshold=0.5, energy=0.1)
    adapter = language("llama-tiny")
    examples = [adapter.encode(r) for r in TEXTS]
    with pytest.raises(InputError, match=r"'model\.norm' is no linear module"):
        input_moments(adapter, adapter.model, ["model.norm"], examples, max_units=512)
    with pytest.raises(InputError, match="needs examples"):
        input_moments(adapter, adapter.model, ["lm_head"], [], max_units=512)
    monkeypatch.setattr(covariance, "_HELD", 10**12)
    with pytest.raises(InputError, match=r"holds a 192 x 192 matrix.* GiB are free"):
        input_moments(adapter, adapter.model, ["model.layers.0.mlp.down_proj"], examples, max_units=512)


def test_weights_know_which_way_they_stand() -> None:
    found = linear_weights(language("gpt2-tiny").model)["transformer.h.0.mlp.c_fc.weight"]
    assert (found.size, found.transposed) == (64, True)
    found = linear_weights(language("llama-tiny").model)["model.layers.0.mlp.down_proj.weight"]
    assert (found.size, found.transposed) == (192, False)
