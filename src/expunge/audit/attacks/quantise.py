"""Weight quantisation as an attack: does rounding the weights bring back what was unlearned?

Unlearning with a small learning rate leaves most weights within half a quantisation step of where they were, so the quantised
unlearned model may be the quantised *target* (Zhang et al. 2025, "Catastrophic Failure of LLM Unlearning via Quantization",
arXiv 2410.16454). The attack costs nothing but a copy, and a retrained model, treated in the same way, is the control.

The rounding is the plainest there is: round to nearest, symmetric, one scale per output channel or per group of inputs, no
calibration data; the weights are returned as floats ("dequantised"), so every adapter can score the result on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.core.errors import InputError


def quantised(adapter: Adapter, bits: int, group: int | None = None, *, embeddings: bool = False) -> Adapter:
    """A copy of the adapter whose linear weights are rounded to ``bits`` bits.

    Rounded are the weights of all ``nn.Linear`` and transformers ``Conv1D`` modules; biases, norms and (unless ``embeddings``)
    embeddings stay, and so does an output layer that shares its weight with an embedding. A LoRA is merged first, as it would be
    for deployment. Weights that are no module of these kinds (stacked experts, for instance) are left alone.

    Args:
        adapter: left unchanged.
        bits: 2 to 8.
        group: inputs that share a scale; none: all inputs of an output channel.
        embeddings: also round the embedding tables, one scale per row (or group of columns).

    Raises:
        InputError: ``bits`` or ``group`` is out of range, or the model has no linear weight.
    """
    _check(bits, group)
    out = merged(adapter.copy())
    with torch.no_grad():
        for weight, transposed in rounded_weights(out.model, embeddings):
            matrix = weight.t() if transposed else weight
            codes, step = encode(matrix, bits, group)
            weight.copy_((decode(codes, step, group).t() if transposed else decode(codes, step, group)).to(weight.dtype))
    return out


def identical_bins(a: Adapter, b: Adapter, bits: int, group: int | None = None, *, embeddings: bool = False) -> float:
    """Share of rounded weights that fall into the same bin in both models, each with its own scales; in [0, 1].

    A high share between the target and the unlearned model explains why quantisation brings knowledge back.

    Raises:
        InputError: the models differ in shape, or see :func:`quantised`.
    """
    _check(bits, group)
    same = total = 0
    pairs = zip(rounded_weights(merged(a).model, embeddings), rounded_weights(merged(b).model, embeddings), strict=False)
    with torch.no_grad():
        for (x, transposed), (y, _) in pairs:
            if x.shape != y.shape:
                raise InputError(f"The two models differ in shape: {tuple(x.shape)} and {tuple(y.shape)}.")
            first, second = (encode(w.t() if transposed else w, bits, group)[0] for w in (x, y.to(x.device)))
            same += int((first == second).sum())
            total += x.numel()
    return same / total


def encode(matrix: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix ``[out, in]`` to integers.

    Args:
        matrix: floats.
        bits: codes lie in ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``.
        group: inputs that share a scale; the last group of a row may be shorter.

    Returns:
        codes ``[out, in]`` (int8) and steps ``[out, groups]`` (float32): the largest magnitude of a group divided by the largest
        code, 1 for a group of zeros. Halves go to the even code.
    """
    top = 2 ** (bits - 1) - 1
    width = matrix.shape[1]
    size = min(group or width, width)
    groups = -(-width // size)
    padded = nn.functional.pad(matrix.float(), (0, groups * size - width)).reshape(matrix.shape[0], groups, size)
    step = padded.abs().amax(dim=2) / top
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = torch.round(padded / step.unsqueeze(2)).clamp_(-top, top).to(torch.int8)
    return codes.reshape(matrix.shape[0], -1)[:, :width], step


def decode(codes: Tensor, step: Tensor, group: int | None = None) -> Tensor:
    """The floats that codes and steps of :func:`encode` stand for, ``[out, in]`` float32."""
    width = codes.shape[1]
    size = min(group or width, width)
    return codes.float() * step.repeat_interleave(size, dim=1)[:, :width]


def _check(bits: int, group: int | None) -> None:
    if not 2 <= bits <= 8:
        raise InputError(f"Weights can be rounded to 2 to 8 bits; got {bits}.")
    if group is not None and group < 1:
        raise InputError(f"A group of weights must hold at least one; got {group}.")


def merged(adapter: Adapter) -> Adapter:
    """The adapter with a LoRA added to the weights, in a copy; itself where there is none."""
    merge: Any = getattr(adapter.model, "merge_and_unload", None)
    if merge is None:
        return adapter
    out = adapter.copy()
    unload: Any = out.model
    out.model = unload.merge_and_unload()
    return out


def rounded_weights(model: nn.Module, embeddings: bool) -> Iterator[tuple[Tensor, bool]]:
    """Weights to round, each once, and whether they are stored ``[in, out]``."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    found = False
    for module in model.modules():
        linear = isinstance(module, nn.Linear)
        transposed = type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter)
        table = isinstance(module, nn.Embedding)
        if not (linear or transposed or (table and embeddings)):
            continue
        weight: Any = module.weight
        found = found or not table
        if id(weight) in seen or (id(weight) in tables and not embeddings):
            continue
        seen.add(id(weight))
        yield weight, transposed
    if not found:
        raise InputError("The model has no linear weight that could be rounded.")
