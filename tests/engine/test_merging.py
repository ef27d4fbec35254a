"""Joining models by their task vectors, against the formulas written out."""

from __future__ import annotations

import pytest
import torch

from expunge.core.errors import InputError
from expunge.engine.merging import Merging, check_alike, merged

DRAW = torch.Generator().manual_seed(0)
BASE = {"a.weight": torch.randn(6, 5, generator=DRAW), "b": torch.randn(40, generator=DRAW), "steps": torch.tensor([3])}


def model(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {k: v + torch.randn(v.shape, generator=draw) if v.is_floating_point() else v + 1 for k, v in BASE.items()}


OTHERS = [model(1), model(2), model(3)]


def vectors(name: str) -> torch.Tensor:
    return torch.stack([m[name] - BASE[name] for m in OTHERS])


def check(found, wanted) -> None:
    for name in ("a.weight", "b"):
        torch.testing.assert_close(found[name], BASE[name] + wanted(vectors(name)), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["steps"], BASE["steps"])


def test_linear_is_task_arithmetic_and_mean_divides_by_the_weights() -> None:
    w = torch.tensor([0.5, -1.0, 2.0])
    check(merged(BASE, OTHERS, Merging(how="linear")), lambda t: t.sum(0))
    check(merged(BASE, OTHERS, Merging(how="linear", weights=(0.5, -1, 2))), lambda t: torch.tensordot(w, t, 1))
    check(merged(BASE, OTHERS, Merging(how="mean")), lambda t: t.mean(0))
    check(merged(BASE, OTHERS, Merging(how="mean", weights=(0.5, -1, 2))), lambda t: torch.tensordot(w, t, 1) / 1.5)


def largest(t: torch.Tensor, density: float) -> torch.Tensor:
    kept = torch.zeros_like(t)
    for row, out in zip(t.flatten(1), kept.flatten(1), strict=True):
        at = row.abs().argsort(descending=True)[: int(density * row.numel())]
        out[at] = row[at]
    return kept


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_trims_elects_a_sign_and_averages_what_agrees(sign) -> None:
    def wanted(t: torch.Tensor) -> torch.Tensor:
        kept = largest(t, 0.4)
        elected = (kept.sum(0) if sign == "total" else kept.sign().sum(0)).sign()
        elected[elected == 0] = 1.0
        agree = (kept.sign() == elected) & (kept != 0)
        return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)

    found = merged(BASE, OTHERS, Merging(how="ties", density=0.4, sign=sign))
    check(found, wanted)
    plain = merged(BASE, OTHERS, Merging(how="mean"))
    assert not torch.allclose(found["b"], plain["b"])


def test_magnitude_is_linear_on_the_largest_entries_and_all_agree_where_nothing_is_left_out() -> None:
    check(merged(BASE, OTHERS, Merging(how="magnitude", density=0.3)), lambda t: largest(t, 0.3).sum(0))
    for how in ("magnitude", "dare-linear"):
        check(merged(BASE, OTHERS, Merging(how=how, density=1.0)), lambda t: t.sum(0))


def test_random_entries_are_scaled_up_and_follow_the_seed() -> None:
    state = torch.get_rng_state()
    one = {"x": torch.zeros(4000)}
    end = [{"x": torch.ones(4000)}]
    made = [merged(one, end, Merging(how="dare-linear", density=0.25, seed=s))["x"] for s in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert set(made[0].tolist()) == {0.0, 4.0}
    assert made[0].mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(torch.get_rng_state(), state)
    signs = merged(BASE, OTHERS, Merging(how="dare-ties", density=0.5, seed=3))
    assert not torch.equal(signs["b"], BASE["b"])


def test_a_model_alone_comes_back_and_half_precision_stays() -> None:
    for how in ("mean", "linear"):
        alone = merged(BASE, OTHERS[:1], Merging(how=how))
        torch.testing.assert_close(alone["a.weight"], OTHERS[0]["a.weight"], rtol=0, atol=1e-6)
    low = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in m.items()} for m in (BASE, *OTHERS)]
    found = merged(low[0], low[1:], Merging(how="ties"))
    assert found["b"].dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="2 weights for 3 models"):
        merged(BASE, OTHERS, Merging(how="linear", weights=(1, 2)))
    with pytest.raises(InputError, match="sum to 0"):
        merged(BASE, OTHERS[:2], Merging(weights=(1, -1)))
    with pytest.raises(InputError, match="density"):
        Merging(density=0)
    with pytest.raises(InputError, match="how"):
        Merging(how="tie")
    less = {k: v for k, v in OTHERS[0].items() if k != "b"}
    with pytest.raises(InputError, match="only the target has 'b'"):
        check_alike(BASE, [less], ["runs/x"])
    with pytest.raises(InputError, match="only runs/x has 'c'"):
        check_alike(BASE, [{**OTHERS[0], "c": BASE["b"]}], ["runs/x"])
    with pytest.raises(InputError, match=r"'b' is \(3,\) and not \(40,\)"):
        check_alike(BASE, [{**OTHERS[0], "b": torch.zeros(3)}], ["runs/x"])
