"""A contrast between pooled hidden states: away from the forget answers, towards other ones (WPN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from expunge.adapters.base import Outputs
from expunge.core.access import Of, Stream
from expunge.engine.parameters import block_index
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


def position_pooled(states: Tensor, owner: Tensor, chosen: Tensor, examples: int) -> Tensor:
    """Mean of the chosen states of each example, the i-th of them with weight i (Muennighoff 2022, arXiv 2202.08904), ``[B, D]``.

    In a causal model later tokens have seen more. Padding is not among the states; an example without chosen ones gets 0.

    Args:
        states: ``[M, D]``.
        owner: whose they are, ``[M]``, ascending.
        chosen: which of them count, bool ``[M]``.
        examples: B.
    """
    whose = owner[chosen]
    counts = torch.bincount(whose, minlength=examples)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(whose), device=whose.device) - first[whose] + 1
    share = place / (counts * (counts + 1) / 2)[whose]
    return states.new_zeros(examples, states.shape[1]).index_add(0, whose, states[chosen] * share.to(states.dtype)[:, None])


@term
class NPair(Term):
    """N-pair contrast of forget prompts with answers (Chen et al. 2024, arXiv 2408.09459).

    ``mean_i log(1 + sum_j exp(s(a_i, n_j) - s(a_i, p_i)))`` with position-weighted means of the hidden states of one block:
    the anchor ``a_i`` of the forget prompt, the positive ``p_i`` of prompt and other answer, and as negatives ``n_j`` those of
    prompt and forget answer of all N examples of the step, the own one too. It is ``log(1 + N)`` where nothing tells them apart.

    What is uncertain: the paper could not be checked in full and has no code. That the anchor is the prompt alone, and that s is
    the cosine divided by a temperature (``temperature=none`` is the plain product, which is large for hidden states), are our
    reading. The states of the last block are those before the model's final norm. The gradient flows through all three.
    """

    name: ClassVar[str] = "n-pair"
    per: ClassVar[Literal["target", "example", "token"]] = "example"
    whole: ClassVar[bool] = True
    paired: ClassVar[bool] = True

    layer: int = Field(-1, ge=-512, lt=512, description="block, counted from 0, negative from the end")
    temperature: float | None = Field(0.1, gt=0, description="by which cosines are divided; none: plain products instead")

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def block(self, layers: Sequence[str]) -> str:
        """Name of the block."""
        return layers[block_index(self.layer, layers)]

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of both kinds of answers under the current model."""
        value = f"features:{self.block(layers)}"
        return frozenset({(Stream.FORGET, Of.CURRENT, value), (Stream.ALTERNATIVE, Of.CURRENT, value)})

    def values(self, views: Views) -> Tensor:
        """One value per forget example, ``[B]``."""
        forget, other = (views.current(s) for s in (Stream.FORGET, Stream.ALTERNATIVE))
        block = self.block(views.layers)
        anchor = self._pooled(forget, block, ~forget.token_supervised)
        negative, positive = (self._pooled(v, block, torch.ones_like(v.token_supervised)) for v in (forget, other))
        differences = anchor @ negative.T - (anchor * positive).sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(differences[:, :1]), differences], dim=1).logsumexp(1)

    def _pooled(self, view: Outputs, block: str, chosen: Tensor) -> Tensor:
        states = view.features(block)
        found = position_pooled(
            states.to(torch.promote_types(states.dtype, torch.float32)), view.token_owner, chosen, view.n_examples
        )
        return found if self.temperature is None else normalize(found, dim=1) / self.temperature**0.5
