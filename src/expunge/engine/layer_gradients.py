"""Gradients of every row from what goes into and out of each layer: one forward and one backward pass for all rows.

A row's gradient of a weight is a product of that row's inputs of the layer and of its loss's gradient at the layer's outputs
(Goodfellow 2015, arXiv 1510.01799; for convolutions Rochette et al. 2019, arXiv 1912.06015, with the inputs unfolded). That
holds where a weight is used once and rows do not mix, which is known of plain stacks of known layers only; other models
are vectorised over rows, which any forward pass allows and which takes longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.engine.functional import Forward, RowLoss, Tensors, moving

_PLAIN: tuple[type[nn.Module], ...] = (
    nn.Flatten, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Dropout,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def is_stack(model: nn.Module) -> bool:
    """Whether a model is a stack of layers each of whose rows and weights are known to stay apart.

    It is a ``Sequential`` (or several in each other) of linear layers, two-dimensional convolutions with zeros around, and
    layers without weights; no module stands in it twice, and none has hooks or a parametrisation.
    """
    seen: set[int] = set()

    def fits(module: nn.Module) -> bool:
        if id(module) in seen or module._forward_hooks or module._forward_pre_hooks:
            return False
        seen.add(id(module))
        kind = type(module)
        if isinstance(module, nn.Sequential) and kind is nn.Sequential:
            return all(fits(child) for child in module)
        if isinstance(module, nn.Flatten):
            return kind is nn.Flatten and module.start_dim == 1
        if isinstance(module, nn.Conv2d):
            zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
            return kind is nn.Conv2d and module.groups == 1 and zeros
        return kind is nn.Linear or kind in _PLAIN

    return type(model) is nn.Sequential and fits(model) and len(list(model.parameters())) == _held(model)


def _held(model: nn.Module) -> int:
    """Parameters, one that several layers share counted for each of them."""
    return len(list(model.named_parameters(remove_duplicate=False)))


def layer_gradients(model: nn.Module, forward: Forward, loss: RowLoss, inputs: Any, targets: Tensor) -> Tensors:
    """The gradient of every row's loss: by parameter name ``[rows, *shape]``, of the parameters that require one.

    Args:
        model: for which :func:`is_stack` holds, in evaluation mode.
        forward: how it is called; it must run the stack once.
        loss: one loss per row.
        inputs, targets: the rows.
    """
    wanted = moving(model)
    layers = {n: m for n, m in model.named_modules() if any(f"{n}.{p}" in wanted for p, _ in m.named_parameters(recurse=False))}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            before[name], after[name] = given[0].detach(), out

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            losses = loss(forward(model, inputs), targets)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(losses.sum(), [after[name] for name in layers])
    found: Tensors = {}
    for (name, layer), at_outputs in zip(layers.items(), gradients, strict=True):
        pair = _convolution(layer, before[name], at_outputs) if isinstance(layer, nn.Conv2d) else (before[name], at_outputs)
        x, g = (t.flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1) for t in pair)  # [rows, places, features]
        if f"{name}.weight" in wanted:
            found[f"{name}.weight"] = torch.bmm(g.transpose(1, 2), x).view(len(g), *wanted[f"{name}.weight"].shape)
        if f"{name}.bias" in wanted:
            found[f"{name}.bias"] = g.sum(1)
    return {name: found[name] for name in wanted}


def _convolution(layer: nn.Conv2d, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ``[rows, places, channels x kernel]`` and gradients at the outputs ``[rows, places, channels]``."""
    assert not isinstance(layer.padding, str)  # see is_stack
    (rows, columns), (down, right), (height, width) = layer.padding, layer.stride, layer.kernel_size
    (tall, wide), (high, broad) = layer.dilation, g.shape[-2:]
    padded = functional.pad(x, (columns, columns, rows, rows)).contiguous()
    n, channels, _, line = padded.shape
    per_row, per_channel = padded.stride()[:2]
    # A view of every window, copied once: the library's own unfolding goes over rows one by one.
    view = padded.as_strided(
        (n, high, broad, channels, height, width),
        (per_row, down * line, right, per_channel, tall * line, wide),
    )
    return view.reshape(n, high * broad, -1), g.flatten(2).transpose(1, 2)
