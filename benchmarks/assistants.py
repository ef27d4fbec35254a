"""What a generated token costs where a model's answer is made by more than one network, beside the target alone.

One target (Llama shape, 8 blocks of width 384, vocabulary 32,000, untied, float32, random weights) continues the same prompts
greedily, by its own ``generate`` and by that of each kind of result. Target and results take turns, so that a busy machine
disturbs all alike; reported are medians over the repeats of the processor's milliseconds per generated token, how often the
target's that is, and the same of scoring (a forward pass over the prompts with all targets' losses). Weights are counted once,
where they are shared.

- ``uld``: the target and its first quarter with a LoRA of rank 16, scores subtracted;
- ``uld, filtered``: the same with the relative top filter at 0.01;
- ``whp-logits``: the target and a whole second copy;
- ``o3, loaded``: the target with a gated LoRA of rank 8 on all projections and a detector that reads every block of the prompt
  in the target's own states, the LoRA loaded for every prompt; ``o3, not loaded``: the same where the detector leaves the
  prompt to the target; ``o3, 4 requests``: four of both, all loaded.

Run: ``python benchmarks/assistants.py [--repeats 5] [--tokens 48] [--batch 1] [--threads 1] [--json FILE]``
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY, PROMPT = 32_000, 64


def target() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def results(model: Any) -> dict[str, Any]:
    """The target and what methods make of it, by name."""
    from expunge.adapters.combination import Combination
    from expunge.adapters.combined import Combined
    from expunge.adapters.storage import block_names
    from expunge.engine.parameters import Assistant

    small = Assistant().prepare(model, block_names(model)).eval()
    blocks = int(small.expunge_blocks)
    generic = Combination(weight=-1.0, link="relu", against="target", centred=False)
    loaded, idle, four = (gated(model, block_names(model), *case) for case in ((1, 0.0), (1, 2.0), (4, 0.0)))
    return {
        "target": model,
        "uld": Combined(model, small, Combination(weight=-0.8), blocks=blocks),
        "uld, filtered": Combined(model, small, Combination(weight=-0.8, filter=0.01), blocks=blocks),
        "whp-logits": Combined(model, copy.deepcopy(model), generic),
        "o3, loaded": loaded,
        "o3, not loaded": idle,
        "o3, 4 requests": four,
    }


def gated(model: Any, names: list[str], requests: int, shift: float) -> Any:
    """The target with updates beside it; their detectors find the prompts usual, or (``shift``) far away."""
    from expunge.adapters.detector import Weighing, fit_detector
    from expunge.adapters.gated import Gated, GatedRequest
    from expunge.adapters.lowrank import LowRank
    from expunge.adapters.reading import HiddenStates
    from expunge.engine.parameters import LoraBeside

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (1, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    seen = HiddenStates(model).features(ids, mask, mask.bool(), range(len(names)), "mean")
    near = seen + seen.std() * (0.1 * torch.randn(64, *seen.shape[1:], generator=generator) + shift)
    held = []
    for _ in range(requests):
        update = LowRank.of(LoraBeside().prepare(model, names).eval())
        with torch.no_grad():
            for b in update.b:
                b.normal_(std=1e-3)
        detector = fit_detector(near[:48], near[48:], layers=range(len(names)), pool="mean", encoder=False, cosine=None)
        held.append(GatedRequest(update, detector, Weighing(rule="hard")))
    return Gated(model, held).eval()


def spent(work: Callable[[], object]) -> float:
    """Processor seconds of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = results(target())
    ids = torch.randint(4, VOCABULARY, (args.batch, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def generate(model: Any) -> None:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False
        )
        if out.shape[1] != PROMPT + args.tokens:
            raise SystemExit("a generation ended early")

    def score(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)["logits"].log_softmax(-1)

    times: dict[str, dict[str, list[float]]] = {name: {"generate": [], "score": []} for name in made}
    for repeat in range(args.repeats + 1):  # the first is not counted
        for name, model in made.items():
            for kind, work in (("generate", generate), ("score", score)):
                seconds = spent(lambda work=work, model=model: work(model))  # type: ignore[misc]
                if repeat:
                    times[name][kind].append(seconds)
    base = {kind: statistics.median(held) for kind, held in times["target"].items()}
    table = {}
    for name, model in made.items():
        median = {kind: statistics.median(held) for kind, held in times[name].items()}
        table[name] = {
            "ms_per_token": 1000 * median["generate"] / args.tokens / args.batch,
            "generation": median["generate"] / base["generate"],
            "scoring": median["score"] / base["score"],
            "weights": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in made["target"].parameters()),
        }
    weights = {name: [float(w) for w in model.weights(ids)[:, 0]] for name, model in made.items() if name.startswith("o3")}
    print("weights of the first prompt:", weights)
    print(f"{'':16}{'ms/token':>10}{'x target':>10}{'scoring x':>11}{'weights x':>11}")
    for name, row in table.items():
        print(f"{name:16}{row['ms_per_token']:10.2f}{row['generation']:10.2f}{row['scoring']:11.2f}{row['weights']:11.2f}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "results": table}, indent=2))


if __name__ == "__main__":
    main()
