"""Composites (ULD, O3) are served as they are: a guard before one changes nothing of its answers but what it refuses."""

import numpy as np
import pytest
import torch

from expunge.adapters.combination import Combination
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.policy import SORRY
from tests.adapters.test_combined import with_assistant
from tests.adapters.test_gated import gated
from tests.guards.conftest import KEY, name_of

SHORT = Sampling(max_tokens=16)


@pytest.fixture(params=["combined", "filtered", "gated"])
def composite(request, target_adapter, people):
    """A target with another network beside it, as ULD and O3 leave it, that answers otherwise than the target."""
    if request.param == "gated":
        made, _ = gated(target_adapter.copy(), people.split.forget, strength=1.0)
        return made
    tau = 0.05 if request.param == "filtered" else None
    return with_assistant(target_adapter.copy(), Combination(weight=-8.0, filter=tau))


def test_a_guarded_composite_gives_the_composites_own_answers(composite, target_adapter, people):
    records = [*people.split.retain[:5], *people.split.forget[:3]]
    names = sorted({name_of(r) for r in people.split.forget})
    made = guard_model(composite, guards="filter", targets=[{"entities": names}], key=KEY)
    bare = guard_model(composite, guards="filter", targets=[], key=KEY)
    own = [g.text for g in composite.generate(composite.model, [composite.encode(r) for r in records], 16)]
    target = [g.text for g in target_adapter.generate(target_adapter.model, [target_adapter.encode(r) for r in records], 16)]
    asked = [r.prompt for r in records]
    assert own != target, "what stands beside the target has no say"
    assert [a.text for a in bare.answers(asked, SHORT)] == own
    said = [a.text for a in made.answers(asked, SHORT)]
    assert said[5:] == [SORRY] * 3
    assert all(a in (b, SORRY) for a, b in zip(said[:5], own[:5], strict=True))
    assert said[:5].count(SORRY) < 5


def test_log_probabilities_are_those_of_the_composite(composite, people):
    record = people.split.retain[0]
    answer = guard_model(composite, guards="filter", targets=[], key=KEY).answers([record.prompt], SHORT, scores=True)[0]
    example = composite.written(composite.encode(record), answer.ids, ended=False)
    with torch.no_grad():
        losses = composite.forward(composite.model, composite.collate([example]), frozenset({"losses"})).losses
    held = np.array(answer.log_probabilities)
    if getattr(composite.model, "combination", None) is not None and composite.model.combination.filter is not None:
        assert (held >= -losses.numpy() - 1e-4).all()  # what the filter drops is excluded where tokens are generated
    else:
        assert np.allclose(-losses.numpy(), held, atol=1e-4)
