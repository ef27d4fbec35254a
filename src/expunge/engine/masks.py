"""Saliency masks: which entries of the weights may move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.objective import Objective, Sums
from expunge.engine.parameters import SaliencyMask


def moving_entries(
    objective: Objective, model: nn.Module, parameters: Sequence[nn.Parameter], max_tokens: int, *, sharded: bool
) -> list[Tensor]:
    """Which entries of the moving parameters may move, by the recipe's choice; an empty list if all may.

    Args:
        objective: the recipe's, on the model as it is before training.
        model: unwrapped.
        parameters: those that move.
        max_tokens: examples per forward pass.
        sharded: whether a process holds parts of the parameters only.

    Raises:
        InputError: a mask on a sharded model, or one made from a forget loss that is not there.
    """
    choice = objective.recipe.parameters
    masks = choice.entries(parameters)
    if sharded and (masks or isinstance(choice, SaliencyMask)):
        raise InputError(
            f"parameters={choice.name} does not work on a sharded (FSDP) model.", "Use parameters=all, named or lora."
        )
    if not isinstance(choice, SaliencyMask):
        return masks
    if not objective.recipe.forget:
        raise InputError(
            "parameters=mask is made from the forget loss, and the recipe has no forget term.", "Use parameters=all."
        )
    return saliency_masks(objective, model, parameters, density=choice.density, examples=choice.examples, max_tokens=max_tokens)


def saliency_masks(
    objective: Objective, model: nn.Module, parameters: Sequence[nn.Parameter], *, density: float, examples: int, max_tokens: int
) -> list[Tensor]:
    """One boolean mask per parameter: the ``density`` of all entries with the largest gradient of the forget loss.

    Computed on the first ``examples`` forget examples, on every process alike. Ties at the threshold all pass.
    """
    total = len(objective.examples[Stream.FORGET])
    plan = {Stream.FORGET: list(range(min(examples, total)))}
    counts = objective.counts(plan)
    held = [torch.zeros_like(p) for p in parameters]
    device = parameters[0].device
    for micro in objective.micro_batches(plan, max_tokens):
        loss, _ = objective.losses(objective.views(model, micro, device), micro, counts, (1.0, 0.0), Sums())
        if loss is None:
            continue
        for total_gradient, g in zip(held, torch.autograd.grad(loss, list(parameters), allow_unused=True), strict=True):
            if g is not None:
                total_gradient.add_(g)
    size = torch.cat([h.abs().flatten() for h in held])
    keep = max(1, round(density * size.numel()))
    threshold = size.kthvalue(size.numel() - keep + 1).values
    return [h.abs() >= threshold for h in held]
