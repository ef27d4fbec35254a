"""Saliency masks: which entries of the weights may move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.adapters.passes import evaluating
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.gradients import fitting
from expunge.engine.objective import Objective
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
    objective: Objective,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    density: float,
    examples: int | None,
    max_tokens: int,
) -> list[Tensor]:
    """One boolean mask per parameter: the ``density`` of all entries with the largest gradient of the loss on the forget set.

    The loss is that of the forget examples' own answers, whatever the recipe teaches in their place (Fan et al. 2023, arXiv
    2310.12508, equation 3, and their code). Computed in evaluation mode, on every process alike, on all forget
    examples, or on so many drawn at random. Ties at the threshold all pass.
    """
    adapter, device = objective.adapter, parameters[0].device
    held = [torch.zeros_like(p) for p in parameters]
    forget = list(objective.examples[Stream.FORGET])
    if examples is not None and examples < len(forget):
        # Not the first ones: rows often lie sorted by class, and the mask would be that of one class.
        chosen = torch.randperm(len(forget), generator=torch.Generator().manual_seed(0))[:examples]
        forget = [forget[i] for i in sorted(chosen.tolist())]
    with evaluating(model), torch.enable_grad():
        for part in fitting(forget, max_tokens):
            loss = adapter.forward(model, adapter.collate(part).to(device), frozenset({"losses"})).losses.sum()
            for total, g in zip(held, torch.autograd.grad(loss, list(parameters), allow_unused=True), strict=True):
                if g is not None:
                    total.add_(g)
    size = torch.cat([h.abs().flatten() for h in held])
    keep = max(1, round(density * size.numel()))
    threshold = size.kthvalue(size.numel() - keep + 1).values
    return [h.abs() >= threshold for h in held]
