"""The sparse autoencoder: what it selects, what it reconstructs, and that nothing but the seed decides what it becomes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from expunge.core.errors import InputError
from expunge.engine.autoencoder import SparseAutoencoder, _loss, explained_variance, fit_autoencoder, select


def mixtures(rows: int, *, signs: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``x = c D0``: eight random unit atoms in sixteen dimensions, two of them in each row; and the coefficients."""
    atoms = torch.randn(8, 16, generator=torch.Generator().manual_seed(99))
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    size = 0.5 + torch.rand(rows, 2, generator=generator)
    if signs:
        size = size * torch.where(torch.rand(rows, 2, generator=generator) < 0.5, -1.0, 1.0)
    which = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(rows)])
    mixed = torch.zeros(rows, 8).scatter(1, which, size)
    return mixed @ atoms, mixed


def fitted(*, signed: bool, signs: bool = True, latents: int = 8, steps: int = 800, seed: int = 0) -> SparseAutoencoder:
    x, _ = mixtures(1000, signs=signs)
    return fit_autoencoder(x, latents=latents, k=2, steps=steps, batch=128, rate=5e-3, signed=signed, seed=seed)


@pytest.fixture(scope="module")
def pair() -> dict[bool, SparseAutoencoder]:
    """Without and with signs, as many latents as there are atoms, on states that use both signs of each."""
    return {signed: fitted(signed=signed) for signed in (False, True)}


@pytest.mark.parametrize("signed", [False, True])
def test_the_selection_is_the_nearest_of_all_codes_that_are_so_sparse(signed):
    """Five points against all supports: the projection on ``|z|_0 <= k``, with ``z >= 0`` where signs are not kept."""
    points = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for k in (1, 2, 5):
        found = select(points, k, signed=signed)
        for u, z in zip(points.tolist(), found.tolist(), strict=True):
            value = u if signed else [max(v, 0.0) for v in u]
            codes = [[v if i in support else 0.0 for i, v in enumerate(value)] for support in combinations(range(6), k)]
            nearest = min(codes, key=lambda c: sum((a - b) ** 2 for a, b in zip(c, u, strict=True)))
            assert z == nearest
        assert ((found != 0).sum(-1) <= k).all()
        assert not signed or ((found != 0).sum(-1) == k).all()
        assert signed or (found >= 0).all()


def test_codes_and_states_are_those_of_the_formula_on_five_points(pair):
    """Sums by hand in float64."""
    model = pair[True]
    held = {n: v.double().numpy() for n, v in model.state_dict().items()}
    states = mixtures(5, signs=True, seed=7)[0]
    for state, z, said in zip(states.double().numpy(), model.encode(states), model.decode(model.encode(states)), strict=True):
        standard = (state - held["mean"]) / held["deviation"] - held["before"]
        u = [sum(held["encoder"][j, i] * standard[i] for i in range(16)) + held["bias"][j] for j in range(8)]
        kept = sorted(range(8), key=lambda j: -abs(u[j]))[:2]
        code = [u[j] if j in kept else 0.0 for j in range(8)]
        np.testing.assert_allclose(z.numpy(), code, atol=1e-5)
        back = [sum(held["decoder"][i, j] * code[j] for j in kept) + held["before"][i] for i in range(16)]
        np.testing.assert_allclose(said.numpy(), np.array(back) * held["deviation"] + held["mean"], atol=1e-5)
    chosen, change = torch.tensor([1, 6]), torch.tensor([[0.5, -2.0]]).expand(5, 2)
    z = model.encode(states)
    moved = z.clone()
    moved[:, chosen] += change
    torch.testing.assert_close(model.shift(change, chosen), model.decode(moved) - model.decode(z), atol=1e-5, rtol=1e-4)


def test_directions_have_length_one_after_training(pair):
    for model in pair.values():
        torch.testing.assert_close(model.decoder.norm(dim=0), torch.ones(8), atol=1e-6, rtol=0)


def test_signs_let_one_direction_carry_both_poles(pair):
    """Two-sparse states with random signs and one latent for each atom: TopK has none left for the other sign."""
    new, _ = mixtures(500, signs=True, seed=5)
    plain, signed = (1 - explained_variance(pair[s], new) for s in (False, True))
    assert plain > 0.2
    assert signed < 0.15
    assert signed < plain / 2
    z = pair[True].encode(new)
    assert ((z > 0).any(dim=0) & (z < 0).any(dim=0)).sum() >= 6
    assert ((z != 0).sum(dim=1) == 2).all()
    assert (pair[False].encode(new) >= 0).all()


def test_twice_as_many_latents_let_topk_catch_up(pair):
    new, _ = mixtures(500, signs=True, seed=5)
    assert explained_variance(fitted(signed=False, latents=16), new) > explained_variance(pair[False], new) + 0.1


def test_where_nothing_is_negative_both_do_the_same():
    new, _ = mixtures(500, signs=False, seed=5)
    found = [explained_variance(fitted(signed=s, signs=False), new) for s in (False, True)]
    assert min(found) > 0.9
    assert abs(found[0] - found[1]) < 0.06


def test_the_seed_decides_everything():
    first, again, other = (fitted(signed=True, steps=50, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(other.decoder, first.decoder)


def test_latents_that_never_fire_are_taught_by_what_the_others_leave():
    """Only by the auxiliary loss does a dead latent get a gradient; its value by hand."""
    x, _ = mixtures(30, signs=True)
    model = SparseAutoencoder(x.mean(dim=0), x.std(dim=0), 64, 2, signed=True, seed=1)
    dead = (model.encode(x) == 0).all(dim=0)
    assert 0 < int(dead.sum()) < 64
    losses, gradients = [], []
    for counted in (torch.zeros_like(dead), dead):
        loss, fired = _loss(model, x, counted)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.encoder)[0])
        assert torch.equal(fired, ~dead)
    assert (gradients[0][dead] == 0).all()
    assert (gradients[1][dead] != 0).any(dim=1).all()
    torch.testing.assert_close(gradients[0][~dead], gradients[1][~dead])
    left = (x - model.decode(model.encode(x))) / model.deviation
    more = ((model.pre(x)[:, dead] @ model.decoder[:, dead].T - left) ** 2).mean().item()
    assert losses[1] - losses[0] == pytest.approx(more / 32, rel=1e-4)


def test_bad_input_and_what_is_undefined(pair):
    x = mixtures(20, signs=True)[0]
    with pytest.raises(InputError, match=r"in \[1, 16\]"):
        fit_autoencoder(x, k=17)
    with pytest.raises(InputError, match="all finite"):
        fit_autoencoder(x * float("nan"))
    with pytest.raises(InputError, match="several"):
        fit_autoencoder(x[:1])
    assert np.isnan(explained_variance(pair[True], x[:1].expand(4, -1)))
