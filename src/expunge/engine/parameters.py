"""Which parameters move: all, named modules, LoRA, a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from expunge.core.errors import InputError, MissingExtra, nearest
from expunge.core.registry import Registry
from expunge.engine.parts import Parameters

PARAMETERS: Registry[type[Parameters]] = Registry("choice of parameters", None, "expunge.parameters")


class AllParameters(Parameters):
    """Every parameter of the model."""

    name: ClassVar[str] = "all"

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Unfreeze everything."""
        return model.requires_grad_(True)


class NamedParameters(Parameters):
    r"""The parameters whose name matches one of the patterns, and no other.

    ``{layer-N}`` in a pattern stands for the name of block N (counted from 0, negative from the end).
    """

    name: ClassVar[str] = "named"

    patterns: tuple[str, ...] = Field((r"down_proj|mlp\.c_proj",), description="regular expressions searched in parameter names")
    layers: tuple[int, ...] | None = Field(
        None, description="only in these blocks, counted from 0, negative from the end; none: everywhere"
    )

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Freeze everything else."""
        names = [n for n, _ in model.named_parameters()]
        chosen = set(self._in_layers(names, layers))
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"The parameter pattern {pattern!r} is no regular expression: {error}.") from None
        hits = {n for n in chosen if any(re.search(p, n) for p in self.patterns)}
        if not hits:
            close = nearest(self.patterns[0], {part for n in names for part in n.split(".") if not part.isdigit()})
            some = ", ".join(close or sorted(names)[:5])
            raise InputError(f"No parameter matches {' or '.join(map(repr, self.patterns))}.", f"Some that exist: {some}.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in hits)
        return model

    def _in_layers(self, names: Sequence[str], layers: Sequence[str]) -> list[str]:
        if self.layers is None:
            return list(names)
        for index in self.layers:
            if not -len(layers) <= index < len(layers):
                raise InputError(
                    f"Layer {index} is out of range: the model has {len(layers)} blocks.",
                    f"Use -{len(layers)} to {len(layers) - 1}.",
                )
        blocks = tuple(layers[i] + "." for i in self.layers)
        return [n for n in names if n.startswith(blocks)]


class Lora(Parameters):
    """Low-rank adapters on the linear modules (Hu et al. 2021, arXiv 2106.09685), by peft; the base stays frozen."""

    name: ClassVar[str] = "lora"

    rank: int = Field(8, ge=1, le=4096, description="rank r of the adapters")
    alpha: float = Field(16.0, gt=0, description="scale: the update is alpha / r * B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    modules: tuple[str, ...] | Literal["all-linear"] = Field("all-linear", description="names of the modules that get an adapter")

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Wrap the model with peft."""
        try:
            import peft
        except ImportError:
            raise MissingExtra("LoRA", "llm") from None
        targets: Any = self.modules if self.modules == "all-linear" else list(self.modules)
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)  # type: ignore[arg-type]
        if targets != "all-linear":
            present = {
                n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
            }
            missing = [t for t in self.modules if t.rsplit(".", 1)[-1] not in present]
            if missing:
                raise InputError(
                    f"The model has no module {missing[0]!r} that LoRA could adapt.", f"It has {', '.join(sorted(present))}."
                )
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped


for choice in (AllParameters, NamedParameters, Lora):
    PARAMETERS.add(choice.name, choice)
