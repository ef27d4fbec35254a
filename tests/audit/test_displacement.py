"""CHES: its closed form, padding, the paper's prediction on a softmax whose states are fixed, and what it is called on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from expunge.adapters.head import head_of
from expunge.audit.displacement import ches, displacement, summed_states
from expunge.core.errors import InputError
from expunge.data.records import Record

RECORDS = [
    Record("a", "a b c d e", prompt="one two"),
    Record("b", "b c", prompt="one two three four five six"),
    Record("c", "e d c b a a b", prompt="six"),
]
OTHERS = ["c d", "b c", "a b c d e"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from expunge.adapters.language import LanguageAdapter
    from expunge.adapters.presets import build
    from expunge.adapters.tokenise import DEFAULT_TEMPLATE
    from expunge.adapters.words import word_tokenizer

    tokenizer = word_tokenizer(["one two three four five six a b c d e", DEFAULT_TEMPLATE])
    return LanguageAdapter(build("llama-tiny", tokenizer, seed=3), tokenizer)


def pairs(adapter):
    own = [adapter.encode(r) for r in RECORDS]
    return [adapter.encode(r, answer=a) for r, a in zip(RECORDS, OTHERS, strict=True)], own


def test_sums_are_over_the_states_that_predict_the_answer_whatever_the_padding(adapter) -> None:
    """Against the model's own last hidden states of each example alone."""
    _, own = pairs(adapter)
    together = summed_states(adapter, own)
    for i, example in enumerate(own):
        ids, start = torch.from_numpy(np.asarray(example.data.ids))[None], example.data.start
        with torch.no_grad():
            states = adapter.model.model(input_ids=ids).last_hidden_state[0].double()  # after the final norm
        assert torch.allclose(together.totals[i], states[start - 1 : -1].sum(0), rtol=1e-4, atol=1e-4)
        assert together.lengths[i] == ids.shape[1] - start
    alone = summed_states(adapter, own, batch_tokens=1)
    assert torch.allclose(alone.totals, together.totals, rtol=1e-4, atol=1e-4)


def test_the_score_is_its_formula(adapter) -> None:
    preferred, own = pairs(adapter)
    found = displacement(adapter, preferred, own)
    plus, minus = (summed_states(adapter, e) for e in (preferred, own))
    for i, one in enumerate(found):
        p, m, n, k = plus.totals[i], minus.totals[i], plus.lengths[i], minus.lengths[i]
        assert one.ches == pytest.approx(float(p @ m - p @ p), rel=1e-9, abs=1e-9)
        assert one.normalised == pytest.approx(float(p @ m / (n * k) - p @ p / n**2), rel=1e-9, abs=1e-9)
        assert one.likeness == pytest.approx(float((p / n) @ (m / k) / ((p / n) @ (p / n))), rel=1e-9)
    assert [f.id for f in found] == ["a", "b", "c"]
    assert found[0].ches != 0
    assert found[0].ches != pytest.approx(displacement(adapter, own, preferred)[0].ches)  # it is not symmetric


def test_equal_answers_have_the_score_nought_exactly_and_scaled_states_its_square(adapter) -> None:
    preferred, own = pairs(adapter)
    assert [d.ches for d in displacement(adapter, own, own)] == [0.0] * 3
    before = displacement(adapter, preferred, own)
    other = adapter.copy()
    with torch.no_grad():
        other.model.model.norm.weight.mul_(3)  # what enters the head, three times as large
    for one, scaled in zip(before, displacement(other, preferred, own), strict=True):
        assert scaled.ches == pytest.approx(9 * one.ches, rel=1e-4, abs=1e-4)
        assert scaled.likeness == pytest.approx(one.likeness, rel=1e-4)


def test_the_head_is_as_it_was_and_pairs_must_fit(adapter) -> None:
    preferred, own = pairs(adapter)
    displacement(adapter, preferred, own)
    assert "forward" not in vars(head_of(adapter.model))
    assert displacement(adapter, [], []) == []
    with pytest.raises(InputError, match="no pairs"):
        displacement(adapter, preferred[:2], own)


def test_it_foretells_which_preferred_answers_gain_least() -> None:
    """A softmax over fixed states with a shared part that favours one common token; the unembedding alone is trained by DPO."""
    torch.manual_seed(0)
    vocabulary, length, width, count = 30, 4, 16, 120
    shared = torch.randn(width, dtype=torch.float64)
    shared /= shared.norm()

    def states() -> torch.Tensor:
        own = torch.randn(count, 1, width, dtype=torch.float64) * torch.rand(count, 1, 1, dtype=torch.float64)
        return (
            2 * torch.rand(count, 1, 1, dtype=torch.float64) * shared
            + own
            + 0.3 * torch.randn(count, length, width, dtype=torch.float64)
        )

    plus, minus = states(), states()
    y_plus, y_minus = (torch.randint(1, vocabulary, (count, length)) for _ in range(2))
    start = 0.1 * torch.randn(vocabulary, width, dtype=torch.float64)
    start[0] += 2 * shared
    scores = ches(plus.sum(1), minus.sum(1))
    change_plus, change_minus = (torch.zeros(count, dtype=torch.float64) for _ in range(2))

    def logp(weight: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (h @ weight.T).log_softmax(-1).gather(-1, y[..., None]).sum((-1, -2))

    for i in range(count):
        weight = start.clone().requires_grad_()
        before = [logp(start, h[i], y[i]) for h, y in ((plus, y_plus), (minus, y_minus))]
        for _ in range(50):
            margin = logp(weight, plus[i], y_plus[i]) - before[0] - logp(weight, minus[i], y_minus[i]) + before[1]
            (gradient,) = torch.autograd.grad(nn.functional.softplus(-0.1 * margin), weight)
            weight = (weight - 0.05 * gradient).detach().requires_grad_()
        change_plus[i] = logp(weight.detach(), plus[i], y_plus[i]) - before[0]
        change_minus[i] = logp(weight.detach(), minus[i], y_minus[i]) - before[1]
    assert stats.spearmanr(scores, change_plus).statistic < -0.6
    quarters = scores.argsort().reshape(4, -1)
    assert all(float(change_minus[q].mean()) < 0 for q in quarters)
    assert float(change_plus[quarters[0]].mean()) > float(change_plus[quarters[3]].mean())


def test_values_are_plain_numbers(adapter) -> None:
    preferred, own = pairs(adapter)
    assert all(isinstance(v, float) for v in list(dataclasses.asdict(displacement(adapter, preferred, own)[0]).values())[1:])
