"""One training step of NPO with NLL on the retain set: our path against textbook loops, in one run.

All sides train the same model (Llama shape, 6 blocks of width 384, vocabulary 32,000, untied, float32) on the same
examples (30 to 96 tokens, a third of each the prompt, batches of 8 forget and 8 retain examples) with AdamW and gradient
clipping, in processes of their own, taking turns, so that a busy machine disturbs all alike. Reported are medians over the
repeats: examples per second, and the growth of resident memory over the process with model and data loaded. Before that,
losses and gradients of both are compared on one batch.

- ``textbook``: transformers' Trainer with ``compute_loss`` overridden as the published code of the field has it: a deep copy of
  the model as reference, one forward pass each for forget, retain and reference, labels given to each, scores at every
  position in float32, sequence losses by cross-entropy over transposed scores, right padding to the longest of a batch.
- ``careful``: the same without its two wastes: no labels where the model's own loss is not read, no transposition.
- ``ours``: reference log-probabilities computed once, one forward pass for both sets, no work on padding, scores only at
  positions that predict a target, fused loss and fused optimiser.

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
from functools import partial
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


def prepare(model, forget, retain):
    """Our adapter, and the examples in its form."""
    import numpy as np

    from expunge.adapters.base import Example
    from expunge.adapters.language import LanguageAdapter
    from expunge.adapters.tokenise import Tokens
    from expunge.adapters.words import word_tokenizer

    def encode(rows, name):
        return [
            Example(f"{name}{i}", "", len(ids) - start, len(ids), Tokens(np.asarray(ids, dtype=np.int32), start, False))
            for i, (ids, start) in enumerate(rows)
        ]

    return LanguageAdapter(model, word_tokenizer(["a"])), encode(forget, "f"), encode(retain, "r")


def our_reference(adapter, examples) -> dict[str, float]:
    import torch

    found: dict[str, float] = {}
    with torch.no_grad():
        for a in range(0, len(examples), 2 * BATCH):
            out = adapter.forward(adapter.model, adapter.collate(examples[a : a + 2 * BATCH]), frozenset({"losses"}))
            found |= zip(out.batch_ids, out.per_example(out.losses).tolist(), strict=True)
    return found


def our_loss(adapter, reference, forget, retain):
    import torch
    from torch.nn.functional import logsigmoid

    out = adapter.forward(adapter.model, adapter.collate(forget + retain), frozenset({"losses"}))
    left, right = out.narrow(0, len(forget)), out.narrow(len(forget), len(forget) + len(retain))
    before = torch.tensor([reference[i] for i in left.batch_ids])
    return -2 / BETA * logsigmoid(BETA * (left.per_example(left.losses) - before)).mean() + right.losses.mean()


def ours(model, forget, retain, steps: int) -> dict[str, float]:
    """The whole engine as ``expunge unlearn --method npo schedule=paper`` runs it."""
    from expunge.core.access import Stream
    from expunge.engine.loop import train
    from expunge.engine.options import Engine
    from expunge.methods.recipe import build

    adapter, forget, retain = prepare(model, forget, retain)
    begin = time.perf_counter()
    our_reference(adapter, forget)
    cached = time.perf_counter() - begin
    marks: list[tuple[float, float]] = []
    recipe = build("npo", {"schedule": {
        "name": "fixed", "lr": RATE, "batch": BATCH, "steps": steps + 1, "warmup": 0, "decay": "constant", "weight_decay": 0,
    }})  # fmt: skip
    train(
        adapter, recipe, {Stream.FORGET: forget, Stream.RETAIN: retain}, Engine(device="cpu", checkpoint_every=0),
        observe=lambda *_: marks.append((time.perf_counter(), time.process_time())),
    )  # fmt: skip
    (wall, busy), (wall_end, busy_end) = marks[1], marks[-1]
    return {"seconds": wall_end - wall, "cpu": busy_end - busy, "cache": cached * steps / (steps + 1)}


def pad(rows):
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sequence_losses(model, batch, careful: bool):
    from torch.nn.functional import cross_entropy

    inputs = {k: v for k, v in batch.items() if k != "labels"} if careful else batch
    scores = model(**inputs).logits.float()[..., :-1, :].contiguous()
    labels = batch["labels"][..., 1:].contiguous()
    if careful:
        flat = cross_entropy(scores.view(-1, scores.shape[-1]), labels.view(-1), ignore_index=-100, reduction="none")
        return flat.view(labels.shape).sum(-1)
    return cross_entropy(scores.transpose(-1, -2), labels, ignore_index=-100, reduction="none").sum(-1)


def textbook_loss(model, reference, forget, retain, careful: bool):
    import torch
    from torch.nn.functional import logsigmoid

    current = sequence_losses(model, forget, careful)
    with torch.no_grad():
        before = sequence_losses(reference, forget, careful)
    return -2 / BETA * logsigmoid(BETA * (current - before)).mean() + model(**retain).loss


def textbook(model, forget, retain, steps: int, careful: bool = False) -> dict[str, float]:
    """The loop that most code of the field has."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def collate(rows):
        return {"forget": pad([r["forget"] for r in rows]), "retain": pad([r["retain"] for r in rows])}

    class Unlearner(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.reference = copy.deepcopy(self.model).eval()

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return textbook_loss(model, self.reference, inputs["forget"], inputs["retain"], careful)

    times: list[float] = []
    processor: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())
            processor.append(time.process_time())

    data = [{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps + 1, learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False, use_cpu=True, seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        Unlearner(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    return {"seconds": times[-1] - times[0], "cpu": processor[-1] - processor[0], "cache": 0.0}


def check(threads: int) -> None:
    """Both sides have the same loss and the same gradient on one batch, with a model that has left its reference."""
    import torch

    torch.set_num_threads(threads)
    forget, retain = examples(BATCH, 0), examples(BATCH, 1)
    model = load_model()
    reference = copy.deepcopy(model).eval()
    adapter, left, right = prepare(model, forget, retain)
    before = our_reference(adapter, left)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    norms = []
    for loss in (
        our_loss(adapter, before, left, right),
        *(textbook_loss(model, reference, pad(forget), pad(retain), careful) for careful in (False, True)),
    ):
        model.zero_grad()
        loss.backward()
        norms.append((loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()))
    for value, norm in norms:
        if abs(value / norms[0][0] - 1) > 1e-4 or abs(norm / norms[0][1] - 1) > 1e-3:
            raise SystemExit(f"The sides do not compute the same: (loss, gradient norm) are {norms}.")
    print(f"same loss ({norms[0][0]:.4f}) and gradient norm ({norms[0][1]:.4f}) on one batch", flush=True)


def child(side: str, steps: int, threads: int, seed: int) -> None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    forget, retain = (examples((steps + 1) * BATCH, seed + shift) for shift in (0, 1000))
    model = load_model()
    memory = Memory()
    run = {"ours": ours, "textbook": textbook, "careful": partial(textbook, careful=True)}[side]
    found = run(model, forget, retain, steps)
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
    parser.add_argument("--side", choices=["ours", "textbook", "careful"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options.side, options.steps, options.threads, options.seed)
        return
    check(options.threads)
    found: dict[str, list[dict[str, float]]] = {"textbook": [], "ours": [], "careful": []}
    for repeat in range(options.repeats):
        for side, rows in found.items():
            rows.append(run(side, options.steps, options.threads, options.seed + repeat))
            last = rows[-1]
            print(
                f"{side:9} {last['rate']:7.2f} examples/s {last['cpu'] / options.steps:7.2f} processor s/step "
                f"{last['memory'] / 2**20:7.0f} MiB  (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    result = {"steps": options.steps, "threads": options.threads, "processors": os.cpu_count(), "against": {}}
    result["median"] = {s: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for s, rows in found.items()}
    for side in ("textbook", "careful"):
        result["against"][side] = compare(found["ours"], found[side])
        print(f"ours against {side}: " + ", ".join(f"{k} {v:.2f}" for k, v in result["against"][side].items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def compare(own: list[dict[str, float]], other: list[dict[str, float]], epochs: int = 10) -> dict[str, float]:
    """Medians of the ratios of neighbouring runs; the pass that caches the reference is spread over ``epochs``."""

    def ratio(top, bottom):
        return statistics.median(top(a, b) / bottom(a, b) for a, b in zip(own, other, strict=True))

    return {
        "throughput": ratio(lambda a, b: b["seconds"], lambda a, b: a["seconds"]),
        "throughput with the reference pass": ratio(lambda a, b: b["seconds"], lambda a, b: a["seconds"] + a["cache"] / epochs),
        "processor time": ratio(lambda a, b: b["cpu"], lambda a, b: a["cpu"]),
        "extra peak memory": ratio(lambda a, b: a["memory"], lambda a, b: b["memory"]),
    }


if __name__ == "__main__":
    main()
