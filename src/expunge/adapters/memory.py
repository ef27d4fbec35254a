"""How much memory training will take, before it starts."""

from __future__ import annotations

from typing import Any

from torch import nn

from expunge.adapters.head import BLOCK_BYTES, KEEP_BYTES, base, head_of
from expunge.adapters.language import LanguageAdapter


def training_memory(
    adapter: LanguageAdapter,
    tokens_per_batch: int,
    *,
    lora: bool = False,
    rank: int = 8,
    trainable: int | None = None,
    optimizer_bytes: int = 8,
    checkpointing: bool = False,
    targets: int | None = None,
) -> int:
    """Estimated bytes of a training run at its peak: weights, gradients, optimiser, activations, scores.

    A first-order count for the planner, meant to be right within a factor of two: activations are taken from the widths of the
    linear modules (each keeps its input, and about as much again is kept by norms, gates and attention).

    Args:
        adapter: holds the model.
        tokens_per_batch: input tokens of one forward pass, forget and retain together.
        lora: only low-rank adapters of ``rank`` on the linear modules train.
        rank: of the adapters.
        trainable: number of trainable values, if it is known.
        optimizer_bytes: state per trainable value (AdamW in float32: 8).
        checkpointing: activations are computed again in the backward pass.
        targets: supervised tokens of one forward pass; none: all.
    """
    model: Any = base(adapter.model)
    parameters = list(model.parameters())
    weights: int = sum(p.numel() * p.element_size() for p in parameters)
    size = parameters[0].element_size()
    head: Any = head_of(adapter.model)
    inputs = outputs = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if module is head or isinstance(module, nn.Embedding) or weight is None or weight.dim() != 2:
            continue
        # nn.Linear stores [out, in]; GPT-2's Conv1D stores [in, out]. Only their sum matters here.
        a, b = weight.shape
        inputs, outputs = inputs + int(a), outputs + int(b)
    if trainable is None:
        trainable = rank * (inputs + outputs) if lora else sum(p.numel() for p in parameters)
    activations = tokens_per_batch * (inputs + outputs) * size * 3 // 2
    if checkpointing:
        depth = max(len(adapter.layers()), 1)
        activations = activations // depth + tokens_per_batch * depth * int(model.get_input_embeddings().weight.shape[1]) * size
    vocabulary = int(head.weight.shape[0]) if head is not None else 0
    rows = tokens_per_batch if targets is None else targets
    matrix = 4 * rows * vocabulary
    kept = matrix if matrix <= KEEP_BYTES else 0
    scores = min(matrix, BLOCK_BYTES) + kept if adapter.fused else 3 * matrix
    extra: int = rank * (inputs + outputs) * 4 if lora else 0
    total: int = weights + extra + trainable * (size + optimizer_bytes) + activations + scores
    return total
