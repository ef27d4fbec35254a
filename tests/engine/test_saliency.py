"""Which weights a saliency mask lets move: by the loss of the forget rows' own classes, not of those that are taught."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from expunge.core.access import Stream
from expunge.engine.loop import train
from expunge.engine.masks import moving_entries
from expunge.engine.objective import Objective
from expunge.methods.recipe import build
from tests.digits import QUIET


def largest(gradients, density: float) -> list[torch.Tensor]:
    everything = torch.cat([g.abs().flatten() for g in gradients])
    least = everything.sort(descending=True).values[round(density * len(everything)) - 1]
    return [g.abs() >= least for g in gradients]


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_a_mask_is_where_the_loss_of_the_own_class_is_steepest(digits, density) -> None:
    adapter = digits.target()
    examples = digits.examples(adapter, "salun")
    model, parameters = adapter.model, list(adapter.model.parameters())
    recipe = build("salun", {"parameters": {"density": density, "examples": 50}})
    masks = moving_entries(Objective(adapter, recipe, examples), model, parameters, 64, sharded=False)
    wanted = {}
    for stream in (Stream.FORGET, Stream.ALTERNATIVE):
        batch = adapter.collate(examples[stream][:50])
        loss = cross_entropy(model(batch.tensors["inputs"]), batch.targets)
        wanted[stream] = largest(torch.autograd.grad(loss, parameters), density)
    same = sum(int((a == b).sum()) for a, b in zip(masks, wanted[Stream.FORGET], strict=True))
    total = sum(p.numel() for p in parameters)
    assert same >= total - 4  # sums in another order
    taught = torch.cat([(a == b).flatten() for a, b in zip(masks, wanted[Stream.ALTERNATIVE], strict=True)])
    assert taught.float().mean() < 0.99
    before = [p.detach().clone() for p in parameters]
    short = recipe.schedule.model_copy(update={"steps": 3, "lr": 1e-3})
    train(adapter, recipe.model_copy(update={"schedule": short}), examples, QUIET)
    for parameter, old, mask in zip(adapter.model.parameters(), before, masks, strict=True):
        assert torch.equal(parameter[~mask], old[~mask])
