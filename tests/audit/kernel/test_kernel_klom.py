from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel_models import Ensemble

from expunge.audit.kernel.klom import klom, klom_floor, klom_summary
from expunge.core.errors import InputError

CEILING = math.log(1e5)
MARGINS = arrays(np.float64, (6, 3), elements=st.floats(-150, 150))


@settings(deadline=None)
@given(MARGINS, MARGINS)
def test_klom_equals_numpys_histograms(p, q):
    found = klom(p, q)
    for j in range(3):
        a, b = np.clip(p[:, j], -100, 100), np.clip(q[:, j], -100, 100)
        low, high = min(a.min(), b.min()), max(a.max(), b.max())
        if high - low < 1e-3:
            continue  # rounding decides the bins
        first, second = (np.histogram((s - low) / (high - low), bins=20, range=(0, 1))[0] / 6 for s in (a, b))
        want = sum(f * math.log(f / max(s, 1e-5)) for f, s in zip(first, second, strict=True) if f > 0)
        on_edge = np.isclose(np.concatenate([a, b]), low + (high - low) * np.arange(21)[:, None] / 20).any(axis=0).sum() > 2
        if not on_edge:
            assert found[j] == pytest.approx(want)
    assert (found <= CEILING + 1e-9).all()
    assert (found >= -20e-5).all()


def test_direction_is_unlearned_to_oracle():
    # Unlearned models sit on one of the oracles' two places: log 2 nats. The other way round half of the mass has no counterpart.
    unlearned, oracles = np.zeros((10, 1)), np.repeat([0.0, 10.0], 5)[:, None]
    assert klom(unlearned, oracles)[0] == pytest.approx(math.log(2))
    assert klom(oracles, unlearned)[0] == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5e5))


def test_no_sample_is_lost_at_the_last_edge():
    # All unlearned margins equal the largest value: a bin that excludes its upper edge would count nothing and give 0.
    unlearned, oracles = np.full((8, 1), 5.0), np.linspace(0, 5, 40)[:, None]
    assert klom(unlearned, oracles)[0] == pytest.approx(math.log(1 / (2 / 40)))
    assert klom(np.full((8, 1), 6.0), oracles)[0] == pytest.approx(CEILING)


def test_clipping_equal_margins_and_broken_ones():
    rng = np.random.default_rng(0)
    oracles = rng.normal(size=(50, 3))
    unlearned = rng.normal(size=(50, 3))
    far = unlearned.copy()
    far[0, 0] = -1e9  # without clipping a single outlier would put all others into one bin, and hide everything
    assert klom(far, oracles, clip=3)[0] > 0.05
    assert klom([[200.0], [math.inf]], [[150.0], [300.0]])[0] == 0  # all 100 after clipping
    far[0, 0] = math.nan
    found = klom(far, oracles)
    assert math.isnan(found[0])
    assert np.isfinite(found[1:]).all()
    with pytest.raises(InputError, match="same examples"):
        klom(unlearned, oracles[:, :2])
    with pytest.raises(InputError, match="two bins"):
        klom(unlearned, oracles, bins=1)


def test_the_floor_falls_with_models_and_with_fewer_bins(monkeypatch):
    rng = np.random.default_rng(0)
    margins = rng.normal(size=(512, 60))
    floors = [klom_floor(margins[:n]).mean for n in (16, 64, 512)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2] > 0
    assert klom_floor(margins[:64], bins=5).mean < floors[1] / 2
    assert klom_floor(margins[:64]).models == (32, 32)
    assert klom_floor(margins[:32], margins[32:64]).mean == pytest.approx(klom_summary(margins[32:64], margins[:32]).mean)
    whole = klom(margins[:64], margins[64:128])
    monkeypatch.setattr("expunge.audit.kernel.klom._CELLS", 256)
    np.testing.assert_array_equal(klom(margins[:64], margins[64:128]), whole)
    with pytest.raises(InputError, match="four oracles"):
        klom_floor(margins[:3])


def match_oracles(zoo, targets: torch.Tensor, used: np.ndarray) -> Ensemble:
    """Oracle matching: each original fitted to the logits of one oracle on the forget set and a part of the retain set."""
    parameters = [p.clone().requires_grad_() for p in zoo.originals.parameters]
    net = Ensemble(parameters)
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    x = zoo.task.x[used]
    for _ in range(150):
        optimiser.zero_grad()
        ((net.head(net.hidden(x)) - targets) ** 2).mean(dim=(1, 2)).sum().backward()
        optimiser.step()
    return Ensemble([p.detach() for p in parameters])


def test_oracle_matching_reaches_the_floor_and_doing_nothing_does_not(zoo):
    task = zoo.task
    margins = {n: zoo.score(m).margin for n, m in (("a", zoo.oracles), ("b", zoo.others), ("original", zoo.originals))}
    flipped, clean, retain = (
        {n: klom_summary(margins[n][:, rows], margins["a"][:, rows]) for n in ("b", "original")}
        for rows in (task.flipped, task.clean, task.retain)
    )
    for found in (flipped, clean, retain):
        assert 1.0 < found["b"].mean < 2.6  # about 1.7 on every subset, 95th percentile 3.1
        assert found["b"].p95 < 4.5
    assert flipped["original"].mean > 7  # about 9.1; the ceiling is 11.5
    assert clean["original"].mean > clean["b"].mean + 0.7
    assert retain["original"].mean > retain["b"].mean + 0.7
    hits = zoo.score(zoo.originals).hit[:, task.flipped].mean(), zoo.score(zoo.oracles).hit[:, task.flipped].mean()
    assert hits[0] - hits[1] < 0.2  # accuracy hardly sees it

    used = np.concatenate([task.forget, task.retain[::2]])
    matched = zoo.score(match_oracles(zoo, zoo.others(task.x[used]), used)).margin
    for rows, floor in ((task.flipped, flipped), (task.clean, clean), (task.retain, retain)):
        value = klom_summary(matched[:, rows], margins["a"][:, rows]).mean
        assert value < floor["b"].mean + 0.6, "oracle matching must reach the floor"
