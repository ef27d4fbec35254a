"""Adversarial inputs: rows moved a little, to where a model's loss is higher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.core.errors import InputError
from expunge.engine.gradients import fitting


def attacked(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    bound: float,
    max_units: int,
    clamp: tuple[float, float] | None = None,
) -> Iterator[tuple[list[Example], dict[str, Tensor]]]:
    """Rows after one step of the fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572), batch by batch.

    ``x + bound * sign(d loss / d x)``: untargeted, on the row's own target, from the row itself. The model is used as it is (call
    it in evaluation mode) and gets no gradient.

    Args:
        adapter: holds the model; must offer rows.
        examples: the rows.
        bound: largest change of an input number, at least 0.
        max_units: size of a forward pass.
        clamp: smallest and largest input number; none: not limited.

    Yields:
        The examples of a batch and their tensors, of which those of real numbers have moved.

    Raises:
        InputError: the inputs are no real numbers (token ids).
    """
    device = next(adapter.model.parameters()).device
    for chosen in fitting(examples, max_units):
        batch = adapter.collate(chosen).to(device)
        moving = {k: v.detach().clone().requires_grad_() for k, v in batch.tensors.items() if v.is_floating_point()}
        if not moving:
            raise InputError("The inputs are no real numbers, so they cannot be moved a little.", "Use another method.")
        with torch.enable_grad():
            scores = adapter.scores(adapter.model, {**batch.tensors, **moving})
            loss = adapter.row_losses(scores, batch.targets).sum()
            gradients = torch.autograd.grad(loss, list(moving.values()))
        moved = {}
        for (name, value), gradient in zip(moving.items(), gradients, strict=True):
            there = value.detach() + bound * gradient.sign()
            moved[name] = there if clamp is None else there.clamp(*clamp)
        yield chosen, {**batch.tensors, **moved}


def classes_under_attack(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    bound: float,
    max_units: int,
    clamp: tuple[float, float] | None = None,
) -> dict[str, int]:
    """What a classifier takes each row for after :func:`attacked`, by example id: the class beyond the nearest boundary.

    At bound 0 it is the model's prediction. Arguments as there.
    """
    found: dict[str, int] = {}
    for chosen, tensors in attacked(adapter, examples, bound=bound, max_units=max_units, clamp=clamp):
        with torch.no_grad():
            classes = adapter.scores(adapter.model, tensors).argmax(1).tolist()
        found |= {e.id: c for e, c in zip(chosen, classes, strict=True)}
    return found
