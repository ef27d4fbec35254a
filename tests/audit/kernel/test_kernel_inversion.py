"""Log-ratios of a few tokens hold the whole distribution: against the full one, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from expunge.audit.kernel.inversion import Expansion, dimension, expand, independent_tokens, log_ratios, normalised
from expunge.core.errors import InputError

WIDTH, VOCABULARY = 32, 200


def model(kind: str):
    """A small model in float64 with random weights."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16, initializer_range=0.3)
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def observed(request):
    """Log-probabilities in 500 contexts ``[500, V]``, and the head's weights."""
    made = model(request.param)
    ids = torch.randint(0, VOCABULARY, (500, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logs = made(input_ids=ids).logits[:, -1].log_softmax(-1)
    return logs.numpy(), made.lm_head.weight.detach().numpy()


def test_ratios_have_the_rank_of_the_hidden_states(observed):
    logs, _ = observed
    assert logs.std() > 0.1
    assert dimension(logs) <= WIDTH
    assert np.linalg.matrix_rank(logs[:, 1:] - logs[:, :1]) <= WIDTH + 1
    noise = normalised(np.random.default_rng(0).standard_normal((300, VOCABULARY)))
    assert dimension(noise) == VOCABULARY - 1  # what no narrow head has made does not compress


def test_as_many_tokens_as_there_are_dimensions_give_back_the_whole_distribution(observed):
    logs, weight = observed
    chosen = independent_tokens(logs)
    assert len(chosen) == dimension(logs) + 1 <= WIDTH + 1
    ratios = log_ratios(logs, chosen)
    assert ratios.shape == (500, len(chosen) - 1)
    fitted = Expansion.fit(logs[:250], chosen)
    np.testing.assert_allclose(fitted.log_probabilities(log_ratios(logs[250:], chosen)), logs[250:], atol=1e-3)
    # A final layer norm without bias leaves the states one dimension fewer than the head's rows have: one token more.
    enough = independent_tokens(logs, extra=WIDTH - dimension(logs))
    np.testing.assert_allclose(expand(log_ratios(logs, enough), enough, weight), logs, atol=1e-8)
    np.testing.assert_allclose(np.exp(expand(log_ratios(logs[0], enough), enough, weight)).sum(), 1)


def test_one_token_fewer_does_not(observed):
    logs, weight = observed
    chosen = independent_tokens(logs)[:-1]
    with pytest.raises(InputError, match="do not determine"):
        expand(log_ratios(logs, chosen), chosen, weight)
    back = Expansion.fit(logs[:250], chosen).log_probabilities(log_ratios(logs[250:], chosen))
    assert np.abs(back - logs[250:]).max() > 0.01


def test_dependent_tokens_are_skipped_and_a_bias_of_the_head_is_no_dimension():
    rng = np.random.default_rng(2)
    weight, bias = rng.standard_normal((40, 3)), rng.standard_normal(40)
    weight[:20] = weight[0]  # twenty tokens that no context can tell apart
    logs = normalised(rng.standard_normal((60, 3)) @ weight.T + bias)
    assert dimension(logs) == 3
    for seed in range(8):
        chosen = independent_tokens(logs, seed=seed)
        assert len(chosen) == 4
        assert (chosen < 20).sum() <= 1
        np.testing.assert_allclose(expand(log_ratios(logs, chosen), chosen, weight, bias), logs, atol=1e-9)
        if (chosen < 20).any():
            with pytest.raises(AssertionError):  # the bias matters
                np.testing.assert_allclose(expand(log_ratios(logs, chosen), chosen, weight), logs, atol=1e-3)
    more = independent_tokens(logs, extra=10, seed=0)
    assert len(set(more.tolist())) == 14
    assert more[:4].tolist() == independent_tokens(logs, seed=0).tolist()
    assert len(independent_tokens(logs, extra=999)) == 40


def test_ratios_are_differences_and_logits_give_the_same():
    scores = np.array([[1.0, 4.0, -2.0, 0.5]])
    assert log_ratios(scores, [2, 0, 3]).tolist() == [[3.0, 2.5]]
    np.testing.assert_allclose(log_ratios(normalised(scores), [2, 0, 3]), [[3.0, 2.5]])
    np.testing.assert_allclose(np.exp(normalised(scores + 1e4)).sum(), 1)


def test_bad_tokens_are_refused():
    scores = np.zeros((3, 4))
    for chosen, what in (([1], "at least two"), ([1, 1], "each once"), ([0, 4], "from 0 to 3"), ([-1, 0], "from 0 to 3")):
        with pytest.raises(InputError, match=what):
            log_ratios(scores, chosen)
    with pytest.raises(InputError, match="more than 3 contexts"):
        Expansion.fit(scores, [0, 1, 2])
