"""Which pairs of answers are too alike to be told apart by preference training: the CHES score.

Preference training (DPO, IdkDPO, AltPO) raises the margin between a preferred answer ``y+`` and a dispreferred ``y-``. The
probability of ``y+`` itself may fall meanwhile, and the mass then goes somewhere else: *likelihood displacement*. Razin et al.
2024, *Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization* (ICLR 2025, arXiv 2410.08847)
foresee it by the centred hidden embedding similarity

    CHES(x, y+, y-) = < S+, S- > - ||S+||^2,    S = sum over answer tokens of the state that predicts the token

with the states that enter the unembedding (after the final norm). The length-normalised form takes means for sums. The higher the
score, the more displacement is expected; it ranks pairs, and has no unit. Their released function sums over columns of a padded
batch, and the script behind their figures adds the state after the last token; here the sum is over exactly the positions that
predict an answer's tokens, the end token included, whatever the padding. For one-token answers to one prompt both sums are the
same vector, and the score is 0 and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.adapters.head import head_of, replaced_head
from expunge.adapters.passes import evaluating
from expunge.audit.scores import by_length
from expunge.audit.store import device_of
from expunge.core.errors import InputError


@dataclass(frozen=True)
class Sums:
    """The summed states of answers.

    Attributes:
        totals: float64 ``[E, D]``.
        lengths: answer tokens, int64 ``[E]``.
    """

    totals: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Mean states, ``[E, D]``."""
        return self.totals / self.lengths[:, None]


def summed_states(adapter: Adapter, examples: Sequence[Example], batch_tokens: int = 8192) -> Sums:
    """Sum over each answer's tokens of the state that predicts the token, from one forward pass per example.

    Args:
        adapter: of a language model.
        examples: the answers, each with its prompt (E).
        batch_tokens: padded tokens per batch.

    Raises:
        InputError: the model has no language-modelling head.
    """
    head = head_of(adapter.model)
    if head is None:
        raise InputError("The model has no language-modelling head, whose inputs are compared.", "Give a language model.")
    held: dict[int, Tensor] = {}
    caught: list[Tensor] = []

    def catch(states: Tensor, _: object) -> Tensor:
        caught.append(states.reshape(-1, states.shape[-1]))
        return states[..., :1]  # scores are not asked for

    device = device_of(adapter.model)
    with torch.no_grad(), evaluating(adapter.model), replaced_head(head, catch):
        for chosen in by_length([e.units for e in examples], batch_tokens):
            batch = adapter.collate([examples[i] for i in chosen]).to(device)
            caught.clear()
            adapter.forward(adapter.model, batch, frozenset({"logits"}))
            states = caught[-1].double()
            totals = states.new_zeros((len(chosen), states.shape[1])).index_add_(0, batch.owner, states)
            held |= {i: totals[row].cpu() for row, i in enumerate(chosen)}
    lengths = torch.tensor([e.n_targets for e in examples])
    return Sums(torch.stack([held[i] for i in range(len(examples))]), lengths)


def ches(preferred: Tensor, other: Tensor) -> Tensor:
    """``< S+, S- > - ||S+||^2`` of each pair, ``[E]``; of means instead of sums it is the length-normalised score.

    Written as ``< S+, S- - S+ >``, which is exactly 0 for equal answers.

    Args:
        preferred: ``S+`` of each pair, ``[E, D]``.
        other: ``S-`` of each pair, ``[E, D]``.
    """
    return (preferred * (other - preferred)).sum(-1)


@dataclass(frozen=True)
class Displacement:
    """The score of one pair.

    Attributes:
        id: of the forget record.
        ches: as defined.
        normalised: with means for sums; this one ranks pairs of different lengths.
        likeness: ``<m+, m-> / ||m+||^2`` of the means, that is one plus the normalised score in units of ``||m+||^2``; 1 where
            the mean state of the other answer lies as far along that of the preferred one as that itself.
    """

    id: str
    ches: float
    normalised: float
    likeness: float


def displacement(
    adapter: Adapter, preferred: Sequence[Example], other: Sequence[Example], batch_tokens: int = 8192
) -> list[Displacement]:
    """CHES of pairs of answers to the same prompts under the adapter's model, in order.

    Args:
        adapter: of a language model.
        preferred: the answers that take the place (E): refusals, or alternatives.
        other: the answers to be forgotten (E).
        batch_tokens: padded tokens per batch.

    Raises:
        InputError: there are not as many of both.
    """
    if len(preferred) != len(other):
        raise InputError(
            f"{len(preferred)} preferred answers and {len(other)} others make no pairs.", "Give one of each per prompt."
        )
    if not other:
        return []
    plus, minus = summed_states(adapter, preferred, batch_tokens), summed_states(adapter, other, batch_tokens)
    raw, normalised = ches(plus.totals, minus.totals), ches(plus.means, minus.means)
    likeness = 1 + normalised / plus.means.square().sum(-1)
    rows = zip(other, raw.tolist(), normalised.tolist(), likeness.tolist(), strict=True)
    return [Displacement(e.id, *values) for e, *values in rows]
