"""One training step of NPO with NLL on the retain set: our path against a textbook loop, in one run.

Both sides train the same model (Llama shape, 6 blocks of width 384, vocabulary 32,000, untied, float32) on the same
examples (30 to 96 tokens, a third of each the prompt, batches of 8 forget and 8 retain examples) with AdamW and gradient
clipping, in processes of their own, taking turns, so that a busy machine disturbs both alike. Reported are medians over the
repeats: examples per second, and the growth of resident memory over the process with model and data loaded.

The textbook loop is what most code of the field does: transformers' Trainer with ``compute_loss`` overridden, a deep copy of
the model as reference, one forward pass each for forget, retain and reference, scores at every position in float32, right
padding to the longest of a batch.

Run: ``python benchmarks/step.py [--repeats 5] [--steps 8] [--threads 2] [--json FILE]``
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, VOCABULARY, BETA, RATE = 8, 32_000, 0.1, 1e-5


def examples(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Random sequences as (ids, length of the prompt)."""
    import numpy as np

    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        size = int(draw.integers(30, 97))
        out.append((draw.integers(4, VOCABULARY, size).tolist(), size // 3))
    return out


def load_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


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


def ours(model, forget, retain, steps: int) -> dict[str, float]:
    """Cached reference log-probabilities, one forward pass for both sets, batches of similar lengths, fused losses."""
    import numpy as np
    import torch
    from torch.nn.functional import logsigmoid

    from expunge.adapters.base import Example
    from expunge.adapters.language import LanguageAdapter
    from expunge.adapters.tokenise import Tokens
    from expunge.adapters.words import word_tokenizer

    adapter = LanguageAdapter(model, word_tokenizer(["a"]))
    want = frozenset({"losses"})

    def encode(rows, name):
        return [
            Example(f"{name}{i}", "", len(ids) - start, len(ids), Tokens(np.asarray(ids, dtype=np.int32), start, False))
            for i, (ids, start) in enumerate(rows)
        ]

    sides = [sorted(encode(rows, name), key=lambda e: e.size) for rows, name in ((forget, "f"), (retain, "r"))]
    begin = time.perf_counter()
    reference: dict[str, float] = {}
    with torch.no_grad():
        for a in range(0, len(sides[0]), 2 * BATCH):
            out = adapter.forward(model, adapter.collate(sides[0][a : a + 2 * BATCH]), want)
            reference |= zip(out.batch_ids, out.per_example(out.losses).tolist(), strict=True)
    cached = time.perf_counter() - begin
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    groups = [(a, a) for a in range(0, steps * BATCH, BATCH)]
    torch.manual_seed(0)
    order = torch.randperm(steps).tolist()
    times, losses = [], []
    model.train()
    for k in [order[-1], *order]:  # the first is a warm-up
        begin = time.perf_counter()
        a, b = groups[k]
        batch = adapter.collate(sides[0][a : a + BATCH] + sides[1][b : b + BATCH])
        out = adapter.forward(model, batch, want)
        left, right = out.narrow(0, BATCH), out.narrow(BATCH, 2 * BATCH)
        shift = torch.tensor([reference[i] for i in left.batch_ids])
        npo = -2 / BETA * logsigmoid(BETA * (left.per_example(left.losses) - shift)).mean()
        loss = npo + right.losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
    return {"seconds": sum(times[1:]), "cache": cached, "loss": losses[0]}


def textbook(model, forget, retain, steps: int) -> dict[str, float]:
    """The loop that most code of the field has."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def collate(rows):
        def pad(side):
            width = max(len(r[0]) for r in side)
            ids = torch.zeros(len(side), width, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for i, (tokens, start) in enumerate(side):
                ids[i, : len(tokens)] = torch.tensor(tokens)
                mask[i, : len(tokens)] = 1
                labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        return {"forget": pad([r["forget"] for r in rows]), "retain": pad([r["retain"] for r in rows])}

    def sequence_loss(scores, labels):
        scores, labels = scores[:, :-1].contiguous(), labels[:, 1:].contiguous()
        flat = cross_entropy(scores.view(-1, scores.shape[-1]), labels.view(-1), ignore_index=-100, reduction="none")
        return flat.view(labels.shape).sum(-1)

    class Unlearner(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.reference = copy.deepcopy(self.model).eval()

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            rows, labels = {k: v for k, v in inputs["forget"].items() if k != "labels"}, inputs["forget"]["labels"]
            current = sequence_loss(model(**rows).logits.float(), labels)
            with torch.no_grad():
                before = sequence_loss(self.reference(**rows).logits.float(), labels)
            npo = -2 / BETA * logsigmoid(BETA * (current - before)).mean()
            return npo + model(**inputs["retain"]).loss

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    data = [{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps + 1, learning_rate=RATE, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, use_cpu=True, seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Unlearner(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()])
        trainer.train()
    return {"seconds": times[-1] - times[1], "cache": 0.0, "loss": trainer.state.log_history[0]["loss"]}


def child(side: str, steps: int, threads: int, seed: int) -> None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    forget, retain = examples(steps * BATCH, seed), examples(steps * BATCH, seed + 1000)
    model = load_model()
    memory = Memory()
    found = {"ours": ours, "textbook": textbook}[side](model, forget, retain, steps)
    print(json.dumps({**found, "memory": memory.growth(), "rate": 2 * BATCH * steps / found["seconds"]}))


def run(side: str, steps: int, threads: int, seed: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps), "--threads", str(threads), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["ours", "textbook"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options.side, options.steps, options.threads, options.seed)
        return
    found: dict[str, list[dict[str, float]]] = {"textbook": [], "ours": []}
    for repeat in range(options.repeats):
        for side, rows in found.items():
            rows.append(run(side, options.steps, options.threads, options.seed + repeat))
            last = rows[-1]
            print(f"{side:9} {last['rate']:7.2f} examples/s  {last['memory'] / 2**20:7.0f} MiB  (load {os.getloadavg()[0]:.1f})", flush=True)
    median = {s: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for s, rows in found.items()}
    pairs = [a["rate"] / b["rate"] for a, b in zip(found["ours"], found["textbook"], strict=True)]
    epochs = 10
    step = median["ours"]["seconds"]
    result = {
        "throughput_ratio": statistics.median(pairs),
        "throughput_ratios": pairs,
        "throughput_ratio_with_cache_over_10_epochs": median["textbook"]["seconds"] / (step + median["ours"]["cache"] / epochs),
        "memory_ratio": median["ours"]["memory"] / median["textbook"]["memory"],
        "median": median,
        "steps": options.steps,
        "threads": options.threads,
        "processors": os.cpu_count(),
    }
    print(
        f"ours / textbook: {result['throughput_ratio']:.2f} times the throughput "
        f"({result['throughput_ratio_with_cache_over_10_epochs']:.2f} with the reference pass, over {epochs} epochs), "
        f"{result['memory_ratio']:.2f} of the extra peak memory"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
