"""Batches of the local backend: what one request meets, or the model, reaches no other request."""

import asyncio
import itertools

from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.serving.backends import LocalBackend
from expunge.serving.errors import Refused
from tests.guards.conftest import KEY


def test_a_model_that_fails_within_a_batch_sends_nothing_twice(target_adapter, people):
    """What has begun ends with the error; what has not is answered alone; the backend goes on."""
    made = guard_model(target_adapter, guards="filter", key=KEY)
    asked = [r.prompt for r in people.split.retain[:3]]
    plain = [a.text for a in made.answers(asked, Sampling(max_tokens=24))]
    calls = itertools.count()

    def fails(module, given):
        if next(calls) == 6:
            raise RuntimeError("out of memory")

    async def both():
        backend = LocalBackend(made, "tiny")
        heard = [[], []]
        with backend._more:  # the batch begins when both wait
            plans = [made.policy.open(Conversation.of(a)) for a in asked]
            how = Sampling(max_tokens=24)
            waits = [
                asyncio.ensure_future(backend.answer(p, how, h.append, lambda: False, scores=False))
                for p, h in zip(plans[:2], heard, strict=True)
            ]
            await asyncio.sleep(0)
        found = await asyncio.gather(*waits, return_exceptions=True)
        after = await backend.answer(plans[2], how, None, lambda: False, scores=False)
        await backend.close()
        return found, heard, after

    handle = target_adapter.model.register_forward_pre_hook(fails)
    try:
        found, heard, after = asyncio.run(both())
    finally:
        handle.remove()
    assert next(calls) > 6
    for at, (result, pieces) in enumerate(zip(found, heard, strict=True)):
        assert isinstance(result, Refused)
        assert result.status == 500
        assert "memory" not in str(result.body())
        assert pieces
        assert plain[at].startswith("".join(pieces))
    assert after.text == plain[2]
