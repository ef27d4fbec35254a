"""What guards cost: a generated token beside the bare model, and a request with 1,000 targets beside one with 10.

One model (Llama shape, 8 blocks of width 384, vocabulary 32,000, float32, random weights) continues the same prompts in batches,
by transformers' ``generate`` and under each guard. They take turns, so that a busy machine disturbs all alike; reported are
medians over the repeats of the processor's milliseconds, how often the bare model's that is, and how often that of the same loop
with no target at all. Prompts and answers name no target, so every answer is written to its end.

Of requests: the time that the guards of a whole conversation and of its answer take, as it grows word by word, by number of
targets.

Run: ``python benchmarks/guards.py [--repeats 5] [--tokens 32] [--batch 4] [--threads 1] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY, PROMPT = 32_000, 64
KEY = b"key of a benchmark, 32 bytes long"


def model_and_tokenizer() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.adapters.words import word_tokenizer

    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "au", "ei") for c in "bdfgklmnprst"]
    tokenizer = word_tokenizer(["Question: Answer:", *(f"{w} {v}" for w in words[:1000] for v in words[:1])])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def targets(count: int) -> list[dict[str, Any]]:
    """Names that occur nowhere."""
    import random

    draw = random.Random(5)
    return [{"entities": [f"Q{draw.randrange(10**9):09d}x Zq{draw.randrange(10**9):09d}y"]} for _ in range(count)]


def turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each side."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def tokens(repeats: int, length: int, batch: int) -> dict[str, Any]:
    import expunge
    from expunge.adapters.language import LanguageAdapter
    from expunge.guards.decoding import Sampling

    model, tokenizer = model_and_tokenizer()
    adapter = LanguageAdapter(model, tokenizer)
    known = [t for t, i in tokenizer.get_vocab().items() if t.isalpha() and i > 4][:PROMPT]
    prompts = [" ".join(known[n:] + known[:n]) for n in range(batch)]
    adapter.end_ids = frozenset()  # answers of the full length
    ids = [adapter.opened(adapter.encode(_record(p))).data.ids for p in prompts]
    rows = torch.tensor([[int(i) for i in r] for r in ids])
    sampling = Sampling(max_tokens=length)

    def bare() -> None:
        with torch.no_grad():
            model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=length,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    sides: dict[str, Callable[[], Any]] = {"bare": bare}
    for name, guards, count in (
        ("no target", "filter", 0),
        ("filter, 10", "filter", 10),
        ("filter, 1,000", "filter", 1000),
        ("prompt, 10", "prompt", 10),
    ):
        made = expunge.guard(adapter, guards=guards, targets=targets(count), key=KEY)
        sides[name] = lambda made=made: made.answers(prompts, sampling)
    found = turns(sides, repeats)
    each = {name: 1000 * s / (length * batch) for name, s in found.items()}
    return {
        name: {"ms per token": each[name], "of bare": each[name] / each["bare"], "of no target": each[name] / each["no target"]}
        for name in sides
    }


def _record(prompt: str) -> Any:
    from expunge.data.records import Record

    return Record(id="p", prompt=prompt, answer="x")


def requests(repeats: int) -> dict[str, Any]:
    """A conversation of 400 words, and an answer of 200 that comes word by word."""
    from expunge.guards.conversation import Conversation
    from expunge.guards.guarded import named
    from expunge.guards.named import rows_of
    from expunge.guards.parts import Material
    from expunge.guards.policy import Policy

    words = [f"word{n % 97} of{n % 31}" for n in range(200)]
    conversation, answer = Conversation.of(" ".join(words)), " ".join(words[:100])
    ends = [i for i, c in enumerate(answer) if c == " "] + [len(answer)]
    sides = {}
    for count in (10, 1000):
        policy = Policy(rows_of("filter"), Material(targets=[named(t) for t in targets(count)], key=KEY))

        def run(policy: Any = policy) -> None:
            for _ in range(10):
                plan = policy.open(conversation)
                for end in ends:
                    plan.release(answer[:end], False)
                plan.release(answer, True)
                assert plan.say is None

        sides[f"{count} targets"] = run
    found = {name: 100 * s for name, s in turns(sides, repeats).items()}
    return {**{f"{n}: ms": v for n, v in found.items()}, "ratio": found["1000 targets"] / found["10 targets"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("repeats", 5), ("tokens", 32), ("batch", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {"tokens": tokens(given.repeats, given.tokens, given.batch), "requests": requests(given.repeats)}
    print(f"{'guard':<16}{'ms a token':>12}{'of bare':>10}{'of no target':>14}")
    for name, row in found["tokens"].items():
        print(f"{name:<16}{row['ms per token']:>12.2f}{row['of bare']:>10.2f}{row['of no target']:>14.2f}")
    print(", ".join(f"{k} {v:.2f}" for k, v in found["requests"].items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
