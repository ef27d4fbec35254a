"""How long requests wait behind others: clients that ask a served model for answers of mixed lengths.

A model (Llama shape, width 384, vocabulary 32,000, random weights) behind the server's own backend, without the network. Each of
the clients asks, waits for the whole answer, and asks again; lengths are drawn from 8, 16, 32 and 96 tokens, with weights 4, 3, 2
and 1. Reported are new tokens per second, the milliseconds until the first piece of an answer comes and until it is whole, by its
length, and how many of the rows that the model computes belong to an answer that still goes on. Beside it some of the same
requests one by one: who is alone waits for nobody.

Run: ``python benchmarks/serving.py [--clients 16] [--each 3] [--blocks 2] [--batch 16] [--threads 1] [--json FILE]``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guards import KEY, model_and_tokenizer, targets, texts

LENGTHS, WEIGHTS = (8, 16, 32, 96), (4, 3, 2, 1)


def measured(clients: int, each: int, blocks: int, batch: int) -> dict[str, Any]:
    """Numbers of one course of requests."""
    import expunge
    from expunge.adapters.language import LanguageAdapter
    from expunge.guards.conversation import Conversation
    from expunge.guards.decoding import Sampling
    from expunge.serving.backends import LocalBackend

    adapter = LanguageAdapter(*model_and_tokenizer(blocks))
    adapter.end_ids = frozenset()  # answers of the full length
    guarded = expunge.guard(adapter, guards="filter", targets=targets(10), key=KEY)
    rows = [0, 0]  # computed, and of answers that go on
    obeyed = guarded.obeyed

    def counted(plans: Any, sampling: Any, *rest: Any, **options: Any) -> Any:
        sizes = [s.max_tokens for s in sampling]
        rows[0] += len(sizes) * max(sizes)
        rows[1] += sum(sizes)
        return obeyed(plans, sampling, *rest, **options)

    guarded.obeyed = counted  # type: ignore[method-assign]
    draw = random.Random(0)
    prompts = texts(clients * each, 32, 1)
    lengths = draw.choices(LENGTHS, WEIGHTS, k=clients * each)

    async def asked(backend: LocalBackend, at: int) -> tuple[int, float, float]:
        began, first = time.perf_counter(), [0.0]

        def sink(piece: str) -> None:
            first[0] = first[0] or time.perf_counter()

        plan = guarded.policy.open(Conversation.of(prompts[at]))
        answer = await backend.answer(plan, Sampling(max_tokens=lengths[at]), sink, lambda: False, scores=False)
        assert answer.tokens == lengths[at]
        ended = time.perf_counter()
        return lengths[at], (first[0] or ended) - began, ended - began

    async def course(backend: LocalBackend, alone: bool) -> tuple[list[tuple[int, float, float]], float]:
        async def client(number: int) -> list[tuple[int, float, float]]:
            return [await asked(backend, number * each + k) for k in range(each)]

        began = time.perf_counter()
        if alone:
            found = [await asked(backend, at) for at in range(clients)]
        else:
            found = [f for some in await asyncio.gather(*(client(n) for n in range(clients))) for f in some]
        return found, time.perf_counter() - began

    async def both() -> dict[str, Any]:
        backend = LocalBackend(guarded, "model", batch=batch)
        await asked(backend, 0)
        out = {}
        for name, alone in (("one by one", True), ("together", False)):
            rows[:] = [0, 0]
            found, seconds = await course(backend, alone)
            out[name] = {"tokens per second": sum(f[0] for f in found) / seconds, "rows in use": rows[1] / rows[0]}
            for length in (*LENGTHS, 0):
                held = [f for f in found if length in (0, f[0])]
                if held:
                    wait, whole = ([1000 * f[k] for f in held] for k in (1, 2))
                    out[name][str(length or "all")] = {"requests": len(held)} | {
                        f"{what} p{q}": np.percentile(ms, q) for what, ms in (("first", wait), ("whole", whole)) for q in (50, 95)
                    }
        await backend.close()
        return out

    return asyncio.run(both())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("clients", 16), ("each", 3), ("blocks", 2), ("batch", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measured(given.clients, given.each, given.blocks, given.batch)
    for name, side in found.items():
        print(f"{name}: {side['tokens per second']:.0f} tokens a second, {side['rows in use']:.0%} of the rows in use")
        for length, row in side.items():
            if isinstance(row, dict):
                print(f"  {length:>4} tokens: " + ", ".join(f"{k} {v:.0f}" for k, v in row.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
