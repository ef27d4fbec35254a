"""Memory and time of projected gradients: with the number of directions, and with the size of the retain set.

NPO with NLL on the retain set trains a small Llama shape (2 blocks of width 256, vocabulary 4,000, float32, AdamW without
momentum, batches of 4 and 4) for a few more steps than there are directions, each setting in a process of its own. Reported
are the growth of peak resident memory over the process with model and data loaded, that growth less the plain rule's, what
the formula says of it, and processor seconds per step (median).

- ``plain``: one backward pass, no projection.
- ``project k``: away from the retain gradients of the last k steps; ``(k - 1) P`` numbers are kept between steps.
- ``null-space``: away from the inputs of the retain set (up to 1,000 examples, in passes of ``engine.max_tokens``), the output
  matrix of one MLP alone, so little moves. Nothing of the set is kept.

Freed blocks of 64 KiB and more go back to the system at once here (``MALLOC_MMAP_THRESHOLD_``), so that resident memory is
what is in use. Under glibc's own threshold, which rises with the blocks that are freed, the peak of a null-space run says more
of the allocator than of the rule: with 512, 1,024 and 4,096 retain examples 347, 269 and 356 MiB, against 240, 241 and 241.

Run: ``python benchmarks/projection.py [--threads 1] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

VOCABULARY, BATCH, FEW, MANY = 4_000, 4, 512, 4_096


class Memory:
    """Growth of the peak resident memory since this was made."""

    def __init__(self) -> None:
        import gc

        gc.collect()
        self.start = self._read("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _read(key: str) -> int:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
        return int(line.split()[1]) * 1024

    def growth(self) -> int:
        return self._read("VmHWM") - self.start


def examples(count: int, seed: int):
    import numpy as np

    from expunge.adapters.base import Example
    from expunge.adapters.tokenise import Tokens

    draw = np.random.default_rng(seed)
    out = []
    for i in range(count):
        ids = draw.integers(4, VOCABULARY, 48).astype(np.int32)
        out.append(Example(f"{seed}-{i}", "", 32, 48, Tokens(ids, 16, False)))
    return out


def child(rule: str, directions: int, retain: int, steps: int, threads: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from expunge.adapters.language import LanguageAdapter
    from expunge.adapters.words import word_tokenizer
    from expunge.core.access import Stream
    from expunge.engine.loop import train
    from expunge.engine.options import Engine
    from expunge.methods.recipe import build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    adapter = LanguageAdapter(LlamaForCausalLM(config), word_tokenizer(["a b"]))
    held = {Stream.FORGET: examples(FEW, 0), Stream.RETAIN: examples(retain, 1)}
    schedule = {"name": "fixed", "lr": 1e-5, "batch": BATCH, "steps": steps, "warmup": 0, "weight_decay": 0, "momentum": 0}
    overrides = {"schedule": schedule, "gradient": {"name": rule}}
    if rule == "project":
        overrides["gradient"]["directions"] = directions
    if rule == "null-space":
        overrides["parameters"] = "layer-window"
    marks: list[float] = []
    memory = Memory()
    train(
        adapter, build("npo", overrides), held, Engine(device="cpu", checkpoint_every=0),
        observe=lambda *_: marks.append(time.process_time()),
    )  # fmt: skip
    moving = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    seconds = sorted(b - a for a, b in pairwise(marks))[len(marks) // 2 - 1]
    print(json.dumps({"memory": memory.growth(), "seconds": seconds, "moving": moving}))


def run(rule: str, directions: int, retain: int, threads: int) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--rule", rule, "--directions", str(directions), "--retain", str(retain), "--threads",
        str(threads), "--steps", str(directions + 3),
    ]  # fmt: skip
    returned = {f"MALLOC_{kind}_THRESHOLD_": str(2**16) for kind in ("MMAP", "TRIM")}
    environment = {**os.environ, **returned, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rule", help=argparse.SUPPRESS)
    parser.add_argument("--directions", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--retain", type=int, default=FEW, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rule:
        child(options.rule, options.directions, options.retain, options.steps, options.threads)
        return
    settings = [("plain", 1, FEW), *(("project", k, FEW) for k in (1, 4, 8)), ("project", 8, MANY)]
    settings += [("null-space", 1, FEW), ("null-space", 1, MANY)]
    rows: list[dict[str, object]] = []
    plain: dict[str, float] = {}
    for rule, directions, retain in settings:
        found = run(rule, directions, retain, options.threads)
        plain = plain or found
        mib = 2**20
        kept = (directions - 1) * found["moving"] * 4 / mib if rule == "project" else 0.0
        rows.append({
            "rule": rule, "directions": directions, "retain": retain, "mib": found["memory"] / mib,
            "more_than_plain_mib": (found["memory"] - plain["memory"]) / mib, "kept_by_formula_mib": kept,
            "seconds_per_step": found["seconds"],
        })  # fmt: skip
        print(
            f"{rule:10} {directions:3d} directions, {retain:5d} retain examples: {found['memory'] / mib:6.0f} MiB, "
            f"{(found['memory'] - plain['memory']) / mib:6.0f} more than plain, {kept:5.0f} kept by formula, "
            f"{found['seconds']:.2f} processor s/step",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "processors": os.cpu_count(), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
