"""A network with low-rank adapters in groups of blocks, of which one group and the head may move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from expunge.core.errors import InputError, MissingExtra


@dataclass(frozen=True)
class Adapted:
    """Makes the network; picklable if ``build`` is.

    The base is the same at every call; the adapters start anew from torch's global generator (their second factor at zero, so
    that an adapter that was never trained does nothing).

    Attributes:
        build: makes the base.
        seed: of the base's weights and of its fresh head, where the builder draws them.
        groups: names of the layers that get adapters, by group, the group nearest to the output first.
        head: name of the module that makes the scores.
        rank, alpha, dropout, rslora: of the adapters.
        stage: the group that may move, with the head; none: nothing.
    """

    build: Callable[[], nn.Module]
    seed: int
    groups: tuple[tuple[str, ...], ...]
    head: str
    rank: int
    alpha: int
    dropout: float
    rslora: bool
    stage: int | None = None

    def __call__(self) -> nn.Module:
        """The network."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise MissingExtra("Low-rank adapters", "llm") from None
        model = base(self.build, self.seed)
        names = [name for group in self.groups for name in group]
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_rslora=self.rslora, target_modules=names
        )
        made: nn.Module = inject_adapter_in_model(config, model)
        moving = self.moving(made)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name in moving)
        return made

    def moving(self, model: nn.Module) -> set[str]:
        """Names of the parameters that may move in this stage."""
        if self.stage is None:
            return set()
        layers = tuple(f"{name}.lora_" for name in self.groups[self.stage])
        found = {name for name, _ in model.named_parameters()}
        return {name for name in found if name.startswith((*layers, f"{self.head}."))}


def base(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network as its builder makes it from a seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of a network, from the input to the output: the entries of its longest list of modules.

    Raises:
        InputError: it has no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError("The model has no list of blocks.", "Use one that keeps its blocks in a ModuleList.")
    name, found = max(lists, key=lambda held: len(held[1]))
    return [f"{name}.{k}" if name else str(k) for k in range(len(found))]


def grouped(model: nn.Module, count: int, layers: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Linear layers with one of the last names ``layers``, in ``count`` groups of neighbouring blocks, the last blocks first.

    Raises:
        InputError: fewer blocks than groups, or a group without such a layer.
    """
    names = blocks(model)
    if len(names) < count:
        raise InputError(f"{len(names)} blocks cannot make {count} groups.", "Choose fewer slices.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    out = []
    for part in np.array_split(np.array(names[::-1]), count):
        inside = [name for name in linear if name.startswith(tuple(f"{block}." for block in part))]
        chosen = tuple(name for name in inside if name.rpartition(".")[2] in layers)
        if not chosen:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in inside})) or "none"
            raise InputError(
                f"The block {str(part[0])!r} has no linear layer called {' or '.join(layers)}.", f"Its linear layers: {known}."
            )
        out.append(chosen)
    return tuple(out)
