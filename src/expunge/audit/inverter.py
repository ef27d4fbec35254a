"""An inverter: a small encoder-decoder that writes a hidden prompt from the log-ratios of the tokens that followed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.presets import build
from expunge.audit.kernel.arrays import Bools, Floats, Integers
from expunge.core.errors import InputError


@dataclass(frozen=True)
class Sequel:
    """What followed a prompt.

    Attributes:
        ratios: log-ratios of each token that followed ``[t, c]``, t at least 1.
        prompt: tokens of the prompt ``[n]``; what is to be found.
    """

    ratios: Floats
    prompt: Integers


@dataclass(frozen=True)
class _Words:
    """The tokens that prompts are made of, as the vocabulary of a model of :mod:`~expunge.adapters.presets`."""

    tokens: Integers
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __len__(self) -> int:
        return len(self.tokens) + 3

    def numbers(self, prompt: Integers) -> Tensor:
        """Places of a prompt's tokens among the words, int64 ``[n]``."""
        return torch.from_numpy(np.searchsorted(self.tokens, prompt) + 3)


class Inverter(nn.Module):
    """``ratios -> Linear, Dropout, GELU, Linear -> encoder -> decoder -> prompt``, as in PILS (arXiv 2506.17090).

    The paper's encoder-decoder is a T5-base that has been trained on text; here it is a small untrained one (64 wide, two blocks
    each side) whose words are the tokens of the prompts at hand, which suits hundreds of pairs and not a million.

    Args:
        pairs: whose ratios are standardised.
        words: every token that a prompt may be made of.
        seed: of the initial weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, pairs: Sequence[Sequel], words: Integers, *, seed: int = 0) -> None:
        super().__init__()
        ratios = torch.from_numpy(np.concatenate([p.ratios for p in pairs])).float()
        self.words = _Words(np.unique(words))
        self.writer: Any = build("t5-tiny", self.words, seed=seed)
        inner, rate = self.writer.config.d_model, self.writer.config.dropout_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bridge = nn.Sequential(
                nn.Linear(ratios.shape[1], 2 * inner), nn.Dropout(rate), nn.GELU(), nn.Linear(2 * inner, inner)
            )
        self.register_buffer("mean", ratios.mean(dim=0))
        self.register_buffer("deviation", ratios.std(dim=0, correction=0).clamp(min=1e-6))

    def forward(self, pairs: Sequence[Sequel], noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B, n, W]`` of the words of prompts, each given those before; and the words, padded with -100."""
        ratios = nn.utils.rnn.pad_sequence([torch.from_numpy(p.ratios).float() for p in pairs], batch_first=True)
        lengths = torch.tensor([len(p.ratios) for p in pairs])
        mask = (torch.arange(ratios.shape[1]) < lengths[:, None]).long()
        labels = nn.utils.rnn.pad_sequence([self.words.numbers(p.prompt) for p in pairs], batch_first=True, padding_value=-100)
        standard = (ratios - self.mean) / self.deviation
        states = self.bridge(standard + noise * torch.randn_like(standard) if noise else standard)
        logits = self.writer(inputs_embeds=states, attention_mask=mask, labels=labels).logits
        return logits.log_softmax(-1), labels


def fit_inverter(
    pairs: Sequence[Sequel],
    words: Integers,
    *,
    epochs: int = 50,
    batch: int = 32,
    rate: float = 3e-3,
    noise: float = 0.0,
    seed: int = 0,
) -> Inverter:
    """Train an inverter on prompts and what a model gave after them (AdamW, constant rate).

    Args:
        pairs: to learn from.
        words: every token that a prompt may be made of, those of prompts that are not learnt from included.
        epochs, batch, rate: of the optimiser.
        noise: standard deviation of what is added to standardised ratios in training; few pairs are learnt by heart without.
        seed: of weights, order, noise and dropout; the global random state is left as it was.

    Raises:
        InputError: there are no pairs, or a ratio is not finite.
    """
    if not pairs or not all(np.isfinite(p.ratios).all() for p in pairs):
        raise InputError("An inverter needs log-ratios, all finite.", "A destroyed model cannot be inverted.")
    inverter = Inverter(pairs, words, seed=seed).train()
    optimiser = torch.optim.AdamW(inverter.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for at in range(0, len(order), batch):
                logs, labels = inverter([pairs[i] for i in order[at : at + batch]], noise)
                loss = functional.nll_loss(logs.flatten(0, 1), labels.flatten(), ignore_index=-100)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return inverter.eval()


@torch.no_grad()
def recovered(inverter: Inverter, pairs: Sequence[Sequel]) -> list[tuple[Floats, Bools]]:
    """What an inverter says of prompts that it has not seen.

    Returns:
        for each the log-probability of each of its tokens, given those before, and whether it is the likeliest, ``[n]``. Where
        all are, the whole prompt is what the inverter writes greedily.
    """
    out = []
    for pair in pairs:
        logs, labels = inverter([pair])
        own = logs[0].gather(1, labels[0, :, None]).squeeze(1)
        out.append((own.double().numpy(), (logs[0].argmax(-1) == labels[0]).numpy()))
    return out
