"""What turns the last hidden state of a language model into scores: its final norm and its head, found by looking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.adapters.head import bare, base, head_of
from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError

_ROWS = 512  # states whose scores are held at a time


class Reader:
    """Reads a hidden state as the last block's.

    The modules are told by what goes in and comes out on three tokens, so no name of any library is needed. What a model does
    to its scores afterwards (Gemma caps them) is left out: it changes no rank.

    Args:
        adapter: of a language model.

    Raises:
        InputError: between the last block and the head is not one module.
    """

    def __init__(self, adapter: Adapter) -> None:
        head = head_of(adapter.model)
        if head is None:
            raise InputError("The model has no language-modelling head.", "Load it with AutoModelForCausalLM.")
        self.head = head
        self.norm = _between(adapter, head)

    def normed(self, states: Tensor) -> Tensor:
        """What the head is given for states ``[R, D]`` after the last block."""
        return states if self.norm is None else self.norm(states[None])[0]

    def scores(self, states: Tensor) -> Tensor:
        """Scores over the vocabulary, float32 or wider, ``[R, V]``."""
        found: Tensor = self.head(self.normed(states)[None])[0]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @torch.no_grad()
    def log_probabilities(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of states ``[R, D]``: log-probability and rank (0: the likeliest) of one token each, ``[R]`` on the CPU."""
        first = next(self.head.parameters())
        logs, ranks = [], []
        with evaluating(self.head):
            for a in range(0, len(tokens), _ROWS):
                said = self.scores(states[a : a + _ROWS].to(first.device, first.dtype))
                own = said.gather(1, tokens[a : a + _ROWS, None].to(said.device))
                logs.append((own - said.logsumexp(1, keepdim=True)).squeeze(1).cpu())
                ranks.append((said > own).sum(1).cpu())
        return torch.cat(logs), torch.cat(ranks)


@torch.no_grad()
def _between(adapter: Adapter, head: nn.Module) -> nn.Module | None:
    """The module between the last block and the head; none if nothing is."""
    inner: Any = base(adapter.model)
    blocks = adapter.layers()
    last: list[Tensor] = []
    given: list[Tensor] = []
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, inputs[0], output))

    outside = [m for n, m in inner.named_modules() if not any(n == b or n.startswith(b + ".") for b in blocks) and m is not head]
    handles: list[Any] = [m.register_forward_hook(note) for m in outside]
    handles.append(inner.get_submodule(blocks[-1]).register_forward_hook(lambda _m, _i, o: last.append(_tensor(o))))
    handles.append(head.register_forward_pre_hook(lambda _m, i: given.append(i[0])))
    try:
        with evaluating(inner):
            device = next(inner.parameters()).device
            ids = torch.arange(3, device=device)[None]
            bare(adapter.model)(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    if last and given and torch.equal(last[-1], given[-1]):
        return None
    found = [m for m, x, y in seen if last and given and torch.equal(x, last[-1]) and torch.equal(y, given[-1])]
    if not found:
        raise InputError(
            f"Between the last block and the head of {type(inner).__name__} there is not one module: no hidden state can be read."
        )
    return found[0]


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
