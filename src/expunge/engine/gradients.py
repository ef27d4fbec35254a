"""Gradients of an adapter's examples outside of training: of a whole set, and how much each weight matters to a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example, Outputs
from expunge.adapters.passes import evaluating

Tell = Callable[[int, int], None]  #: (batches done, of how many)


def moving(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that may move, by name: a frozen one has no gradient and keeps its value."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def mean_gradient(adapter: Adapter, examples: Sequence[Example], max_units: int) -> dict[str, Tensor]:
    """Gradient of the mean loss per target over a whole set, in evaluation mode; forward passes of at most ``max_units``."""
    model: nn.Module = adapter.model
    parameters = moving(model)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    targets = max(1, sum(e.n_targets for e in examples))
    with evaluating(model), torch.enable_grad():
        for batch in fitting(examples, max_units):
            loss = _outputs(adapter, batch, "losses").losses.sum() / targets
            _add(total, parameters, loss)
    return total


def batch_importance(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    batch: int,
    of: Literal["loss", "norm"] = "loss",
    power: Literal["square", "absolute"] = "square",
    weigh: Literal["batches", "targets"] = "batches",
    tell: Tell | None = None,
) -> dict[str, Tensor]:
    """How much each weight matters to a set, from the gradients of batch means, in one pass and in evaluation mode.

    ``I = (1 / batches) sum_batches |g|`` or ``g^2`` with ``g = d mean_batch(loss) / d theta``: of the *mean* over the batch, so
    its value depends on the batch size, and two sets can only be compared at the same one. The last batch may be smaller and
    counts as one (Foster et al. 2023, arXiv 2308.07707).

    Args:
        adapter: holds the model.
        examples: the set, in the order in which it is cut into batches.
        batch: examples per batch.
        of: the loss per target, or the squared norm of the scores of each target, which needs no labels.
        power: what is summed of a gradient.
        weigh: whether every batch counts alike, or by its number of targets (Cha et al. 2024, arXiv 2408.06621).
        tell: called after every batch.
    """
    model: nn.Module = adapter.model
    parameters = moving(model)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    starts = range(0, len(examples), batch)
    everything = max(1, sum(e.n_targets for e in examples))
    with evaluating(model), torch.enable_grad():
        for done, start in enumerate(starts, start=1):
            chosen = examples[start : start + batch]
            if of == "loss":
                value = _outputs(adapter, chosen, "losses").losses.mean()
            else:
                value = _outputs(adapter, chosen, "logits").logits.square().sum(1).mean()
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            share = 1 / len(starts) if weigh == "batches" else sum(e.n_targets for e in chosen) / everything
            for held, g in zip(total.values(), gradients, strict=True):
                if g is not None:
                    held.add_(g.abs() if power == "absolute" else g.square(), alpha=share)
            if tell is not None:
                tell(done, len(starts))
    return total


def fitting(examples: Sequence[Example], max_units: int) -> Iterator[list[Example]]:
    """Examples in batches of like cost that hold at most ``max_units`` (or one example)."""
    order = sorted(examples, key=lambda e: e.units)
    at = 0
    while at < len(order):
        stop = at + 1
        while stop < len(order) and order[stop].units * (stop + 1 - at) <= max_units:
            stop += 1
        yield order[at:stop]
        at = stop


def _outputs(adapter: Adapter, examples: Sequence[Example], value: str) -> Outputs:
    device = next(adapter.model.parameters()).device
    return adapter.forward(adapter.model, adapter.collate(examples).to(device), frozenset({value}))


def _add(total: dict[str, Tensor], parameters: dict[str, nn.Parameter], loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for held, g in zip(total.values(), gradients, strict=True):
        if g is not None:
            held.add_(g)
