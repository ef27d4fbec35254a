"""What guards cost: a generated token, a request with many targets, a new target, and what is held back of a stream.

One model (Llama shape, 8 blocks of width 384, vocabulary 32,000, float32, random weights) continues the same prompts in batches,
by transformers' ``generate`` and under each guard. They take turns, so that a busy machine disturbs all alike; reported are
medians over the repeats of the processor's milliseconds, how often the bare model's that is, and how often that of the same loop
with no target at all. Every answer is written to its end; a guard whose cost depends on whether it has noticed something is
measured on prompts that it does not notice and on prompts of which it notices all. ``alu`` is not among them: its cost is that of
its agents; nor is ``in-context``, which needs a model that was taught its tag, and costs the tokens of that tag.

Of requests: the time that each detector takes for a whole conversation, and for its answer as it grows word by word, with 10 and
with 1,000 targets; and the time until one target more is hidden. Of streams: how many tokens are known and not yet sent.

Run: ``python benchmarks/guards.py [--repeats 5] [--tokens 32] [--batch 4] [--threads 1] [--parts tokens ...] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

VOCABULARY, PROMPT = 32_000, 64
KEY = b"key of a benchmark, 32 bytes long"
MADE = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "au", "ei") for c in "bdfgklmnprst"]
RATE = 0.05  #: of false alarms, where a detector takes one


def model_and_tokenizer(blocks: int = 8) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.adapters.words import word_tokenizer

    words = [f" {a}{b}" for a in MADE for b in MADE[:40]][: VOCABULARY - 100]
    tokenizer = word_tokenizer(["Question: Answer:?", *(f"{w}" for w in words)], size=VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=blocks, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def texts(count: int, length: int, seed: int) -> list[str]:
    """Texts of made-up words, most of which the tokenizer knows."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(MADE) + draw.choice(MADE[:40]) for _ in range(length)) for _ in range(count)]


def targets(count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Names that occur nowhere, each with one question and its answer of twelve words."""
    draw = random.Random(seed)
    made = []
    for asked, said in zip(texts(count, 10, seed + 1), texts(count, 12, seed + 2), strict=True):
        name = f"Q{draw.randrange(10**9):09d}x Zq{draw.randrange(10**9):09d}y"
        answer = " ".join(w.capitalize() if at % 3 == 0 else w for at, w in enumerate(said.split()))
        made.append({"entities": [name], "examples": [{"prompt": f"Who is {name}, {asked}?", "answer": f"{name} is {answer}."}]})
    return made


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


# ---- a generated token

#: Title, guards, number of targets, whether the prompts name a target.
GUARDED: tuple[tuple[str, Any, int, bool], ...] = (
    ("no target", "filter", 0, False),
    ("filter, 10 targets", "filter", 10, False),
    ("filter, 1,000 targets", "filter", 1000, False),
    ("content, 10 targets", "content", 10, False),
    ("prompt, 10 targets", "prompt", 10, False),
    ("icul, noticed", "icul", 10, True),
    ("eco, not noticed", {"guard": "eco", "detector.rate": RATE}, 10, False),
    ("eco, noticed", {"detector": "always", "action": "corrupt"}, 10, False),
    ("guard, not noticed", {"guard": "guard", "detector.rate": RATE}, 10, False),
    ("guard, noticed", {"detector": "always", "action": "bar"}, 10, False),
    ("key-space", "key-space", -1, False),
    ("neuron-adjust", "neuron-adjust", -1, False),
)


def tokens(repeats: int, length: int, batch: int) -> dict[str, Any]:
    import expunge
    from expunge.adapters.language import LanguageAdapter
    from expunge.data.records import Record
    from expunge.guards.conversation import Conversation
    from expunge.guards.decoding import Sampling

    model, tokenizer = model_and_tokenizer()
    adapter = LanguageAdapter(model, tokenizer)
    prompts = texts(batch, PROMPT, 1)
    adapter.end_ids = frozenset()  # answers of the full length
    ids = [adapter.opened(adapter.encode(Record(id="p", prompt=p, answer="x"))).data.ids for p in prompts]
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(r)) + [int(i) for i in r] for r in ids])
    sampling = Sampling(max_tokens=length)

    def bare() -> None:
        with torch.no_grad():
            model.generate(
                rows, attention_mask=(rows > 0).long(), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
            )

    sides: dict[str, Callable[[], Any]] = {"bare": bare}
    noticed = {}
    for title, guards, count, named in GUARDED:
        hidden: list[dict[str, Any]] = [{"skills": ["digits"]}] if count < 0 else targets(count)
        probes = {"digits": [" ".join(str((7 * n + k) % 10) for k in range(20)) for n in range(40)], "": texts(40, 20, 9)}
        made = expunge.guard(adapter, guards=guards, targets=hidden, ordinary=texts(200, 12, 3), probes=probes, key=KEY)
        asked = [f"{p} {hidden[at % len(hidden)]['entities'][0]}" if named else p for at, p in enumerate(prompts)]
        plans = [made.policy.open(Conversation.of(q)) for q in asked]
        assert all(a.tokens == length for a in made.obeyed(plans, [sampling] * batch)), f"{title}: an answer was cut"
        noticed[title] = sum(bool(p.fired) for p in plans)
        sides[title] = lambda made=made, asked=asked: made.answers(asked, sampling)
    found = turns(sides, repeats)
    each = {name: 1000 * s / (length * batch) for name, s in found.items()}
    return {
        name: {
            "ms per token": each[name], "of bare": each[name] / each["bare"], "of no target": each[name] / each["no target"],
            "noticed": noticed.get(name, 0), "of": batch,
        }
        for name in sides
    }  # fmt: skip


# ---- requests, and targets that come


DETECTORS: dict[str, Any] = {
    "terms": {"detector": "terms", "action": "refuse"},
    "similar": {"detector": {"name": "similar", "rate": RATE}, "action": "refuse"},
    "content": {"detector": "content", "action": "refuse"},
    "classifier": {"detector": {"name": "classifier", "rate": RATE}, "action": "refuse"},
    "states": {"detector": {"name": "states", "rate": RATE}, "action": "refuse"},
    "bar": {"detector": "always", "action": "bar"},
}
COUNTS = (10, 1000)


def requests(repeats: int) -> dict[str, Any]:
    """A conversation of 200 words, an answer of 100 that comes word by word; and one target more, beside 10 and beside 1,000.

    Of ``states``, a request is what the network makes of the prompt's states: to read them costs nothing. A new target costs a
    pass of the model over its question, here of a model of one block, and a fit of the network.
    """
    from expunge.adapters.language import LanguageAdapter
    from expunge.guards.conversation import Conversation
    from expunge.guards.guarded import named
    from expunge.guards.named import rows_of
    from expunge.guards.parts import Material
    from expunge.guards.policy import Policy

    adapter = LanguageAdapter(*model_and_tokenizer(blocks=1))
    conversation, answer = Conversation.of(texts(1, 200, 11)[0]), texts(1, 100, 12)[0]
    ends = [i for i, c in enumerate(answer) if c == " "] + [len(answer)]
    out = {}
    for title, row in DETECTORS.items():
        sides: dict[str, Callable[[], Any]] = {}
        activated = {}
        for count in COUNTS:
            held = [named(t) for t in targets(count)]
            policy = Policy(rows_of(row), Material(targets=held, ordinary=texts(200, 12, 3), key=KEY, adapter=adapter))

            def run(policy: Any = policy, ends: Sequence[int] = ends if title in ("terms", "content") else ()) -> None:
                for _ in range(10):
                    plan = policy.open(conversation)
                    if plan.readings:
                        plan.read({r: torch.linspace(-1, 1, 384) for r in plan.readings})
                    for end in ends:
                        plan.release(answer[:end], False)
                    plan.release(answer, True)

            sides[str(count)] = run
            activated[str(count)] = _activation(policy, [named(t) for t in targets(3, seed=77)])
        found = {name: 100 * s for name, s in turns(sides, repeats).items()}
        first, last = (str(c) for c in COUNTS)
        out[title] = {"ms": found, "ratio": found[last] / found[first], "ms to hide one more": activated}
    return out


def _activation(policy: Any, new: Sequence[Any]) -> float:
    """Median milliseconds by the clock until a target more is hidden; it is given up again."""
    found = []
    for target in new:
        began = time.perf_counter()
        policy.add(target)
        found.append(1000 * (time.perf_counter() - began))
        policy.drop(target.id)
    return statistics.median(found)


# ---- streams


def streams(milliseconds: float) -> dict[str, Any]:
    """Tokens that are known and not sent, at each token of an answer of 40 sentences of 12 words with a token each.

    Args:
        milliseconds: that a token of one request takes.
    """
    from expunge.guards.conversation import Conversation
    from expunge.guards.guarded import named
    from expunge.guards.named import rows_of
    from expunge.guards.parts import Material
    from expunge.guards.policy import Policy

    sentences = [f"{t[0].upper()}{t[1:]}." for t in texts(40, 12, 13)]
    pieces = [f" {w}" for s in sentences for w in s.split()]
    out = {}
    for title, row in {"terms": "filter", "content": "content", "both": ["filter", "content"]}.items():
        policy = Policy(rows_of(row), Material(targets=[named(t) for t in targets(10)], key=KEY))
        plan, text, ends, held = policy.open(Conversation.of("A question?")), "", [], []
        for piece in pieces:
            text += piece
            ends.append(len(text))
            sent = plan.release(text, False)
            held.append(sum(e > sent for e in ends))
        assert plan.say is None
        first = next((at for at, n in enumerate(held) if n <= at), len(held))  # tokens before one can be sent
        found = {"mean": statistics.mean(held), "most": max(held), "first": first}
        out[title] = {f"tokens, {k}": v for k, v in found.items()} | {f"ms, {k}": v * milliseconds for k, v in found.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("repeats", 5), ("tokens", 32), ("batch", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--parts", nargs="+", default=["tokens", "requests", "streams"], choices=["tokens", "requests", "streams"]
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {}
    if "tokens" in given.parts:
        found["tokens"] = tokens(given.repeats, given.tokens, given.batch)
        print(f"{'guard':<24}{'ms a token':>12}{'of bare':>10}{'of no target':>14}{'noticed':>10}")
        for name, row in found["tokens"].items():
            said = f"{row['noticed']} of {row['of']}"
            print(f"{name:<24}{row['ms per token']:>12.2f}{row['of bare']:>10.2f}{row['of no target']:>14.2f}{said:>10}")
    if "requests" in given.parts:
        found["requests"] = requests(given.repeats)
        print(f"{'detector':<12}{'ms, 10':>10}{'ms, 1,000':>12}{'ratio':>8}{'ms to hide one more: 10':>26}{'1,000':>10}")
        for name, row in found["requests"].items():
            (a, b), (c, d) = row["ms"].values(), row["ms to hide one more"].values()
            print(f"{name:<12}{a:>10.2f}{b:>12.2f}{row['ratio']:>8.2f}{c:>26.2f}{d:>10.2f}")
    if "streams" in given.parts:
        step = found["tokens"]["no target"]["ms per token"] * given.batch if "tokens" in found else 1000 / 50
        found["streams"] = streams(step)
        print(f"held back, where a step takes {step:.1f} ms:")
        for name, row in found["streams"].items():
            print(f"{name:<12}" + ", ".join(f"{k} {v:.1f}" for k, v in row.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
