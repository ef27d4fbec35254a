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
    recipe = build("salun", {"parameters": {"density": density}})
    masks = moving_entries(Objective(adapter, recipe, examples), model, parameters, 64, sharded=False)
    wanted = {}
    for stream in (Stream.FORGET, Stream.ALTERNATIVE):
        batch = adapter.collate(examples[stream])
        loss = cross_entropy(model(batch.tensors["inputs"]), batch.targets)
        wanted[stream] = largest(torch.autograd.grad(loss, parameters), density)
    same = sum(int((a == b).sum()) for a, b in zip(masks, wanted[Stream.FORGET], strict=True))
    total = sum(p.numel() for p in parameters)
    assert same >= total - 4  # sums in another order
    taught = torch.cat([(a == b).flatten() for a, b in zip(masks, wanted[Stream.ALTERNATIVE], strict=True)])
    assert taught.float().mean() < 0.99
    some = build("salun", {"parameters": {"density": density, "examples": 20}})
    of_some = moving_entries(Objective(adapter, some, examples), model, parameters, 64, sharded=False)
    other = torch.cat([(a != b).flatten() for a, b in zip(of_some, masks, strict=True)])
    assert 0 < other.float().mean() < density, "a sample says nearly the same, and not exactly"
    before = [p.detach().clone() for p in parameters]
    short = recipe.schedule.model_copy(update={"steps": 3, "lr": 1e-3})
    train(adapter, recipe.model_copy(update={"schedule": short}), examples, QUIET)
    for parameter, old, mask in zip(adapter.model.parameters(), before, masks, strict=True):
        assert torch.equal(parameter[~mask], old[~mask])


def test_rows_that_lie_sorted_by_class_all_count(digits) -> None:
    adapter = digits.target()
    rows = digits.tables[0]
    forget = [adapter.encode(r) for c in ("0", "1") for r in rows.rows(rows.select(classes=[c]))]
    parameters = list(adapter.model.parameters())

    def mask(held_rows, **more) -> torch.Tensor:
        recipe = build("salun", {"parameters": {"density": 0.1, **more}})
        held = {Stream.FORGET: held_rows, Stream.RETAIN: held_rows, Stream.ALTERNATIVE: held_rows}
        found = moving_entries(Objective(adapter, recipe, held), adapter.model, parameters, 64, sharded=False)
        return torch.cat([m.flatten() for m in found])

    assert torch.equal(mask(forget), mask(forget[::-1]))
    half = len(forget) // 2
    of_first = mask(forget[:half])
    drawn = mask(forget, examples=half)
    assert (drawn != mask(forget)).sum() < (of_first != mask(forget)).sum()
