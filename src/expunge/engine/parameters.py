"""Which parameters move: all, those of a name or of a few blocks, a LoRA, or what is left of a mask."""

from __future__ import annotations

import abc
import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.adapters.storage import OWN_BASE
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError, MissingExtra, nearest
from expunge.core.registry import Registry
from expunge.core.search import Search
from expunge.engine.feedforward import OUTPUT, FeedForward
from expunge.engine.fila import check_own, drawn, factors, relative_importance
from expunge.engine.options import Engine
from expunge.engine.parts import Parameters
from expunge.engine.preparation import Examples, Tell
from expunge.engine.projection import ProjectedStates

PARAMETERS: Registry[type[Parameters]] = Registry("choice of parameters", None, "expunge.parameters")


class AllParameters(Parameters):
    """Every parameter of the model."""

    name: ClassVar[str] = "all"

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Unfreeze everything."""
        return model.requires_grad_(True)


def block_index(layer: int | None, layers: Sequence[str]) -> int:
    """The position of a block, counted from 0; negative counts from the end, none is 7/32 of the depth.

    7 of 32 is the choice of the RMU paper (arXiv 2403.03218) for a 7B model, carried over to other depths in proportion: a
    model of 4 blocks gets block 1, of 12 block 3, of 32 block 7.

    Raises:
        InputError: the model has no such block.
    """
    if layer is None and layers:
        return min(round(len(layers) * 7 / 32), len(layers) - 1)
    if layer is None or not -len(layers) <= layer < len(layers):
        remedy = f"Use -{len(layers)} to {len(layers) - 1}." if layers else ""
        raise InputError(f"Layer {layer} is out of range: the model has {len(layers)} blocks.", remedy)
    return layer % len(layers)


class _Matching(Parameters):
    """Parameters chosen by their name, in all blocks or in some."""

    patterns: tuple[str, ...] = Field(
        (OUTPUT,),
        min_length=1,
        description="regular expressions searched in parameter names; the default is the output matrix of an MLP, or in given "
        "blocks of a model without such names all matrices",
    )

    @abc.abstractmethod
    def blocks(self, layers: Sequence[str]) -> Sequence[int] | None:
        """Positions of the blocks in which to search; none: the whole model."""

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Freeze everything else."""
        names = [n for n, _ in model.named_parameters()]
        searches = [_compiled(p) for p in self.patterns]
        chosen = self.blocks(layers)
        inside = names if chosen is None else [n for n in names if n.startswith(tuple(layers[i] + "." for i in chosen))]
        hits = {n for n in inside if any(s.search(n) for s in searches)}
        if not hits and self.patterns == type(self).model_fields["patterns"].default and chosen is not None:
            # A model without such names (a plain network): all matrices of the blocks that were chosen.
            hits = {n for n in inside if n.endswith("weight")}
        if not hits:
            close = nearest(self.patterns[0], {part for n in inside for part in n.split(".") if not part.isdigit()})
            some = ", ".join(close or sorted(inside)[:5])
            raise InputError(f"No parameter matches {' or '.join(map(repr, self.patterns))}.", f"Some that exist: {some}.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in hits)
        return model


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"The parameter pattern {pattern!r} is no regular expression: {error}.") from None


class NamedParameters(_Matching):
    """The parameters whose name matches one of the patterns, and no other."""

    name: ClassVar[str] = "named"

    layers: tuple[int, ...] | None = Field(
        None, description="only in these blocks, counted from 0, negative from the end; none: everywhere"
    )

    def blocks(self, layers: Sequence[str]) -> Sequence[int] | None:
        """Those that were named."""
        return None if self.layers is None else [block_index(i, layers) for i in self.layers]


class LayerWindow(_Matching):
    """The matching parameters of a few blocks in a row, the last of them at a given depth (RMU, arXiv 2403.03218).

    With the defaults these are the MLP output matrices of the steered block and of the two before it, as far as there are any.
    """

    name: ClassVar[str] = "layer-window"

    layer: int | None = Field(None, description="last block, counted from 0, negative from the end; none: 7/32 of the depth")
    width: int = Field(3, ge=1, description="number of blocks, ending with the last")

    def blocks(self, layers: Sequence[str]) -> Sequence[int] | None:
        """``layer - width + 1`` to ``layer``, cut at the first block."""
        last = block_index(self.layer, layers)
        return range(max(0, last - self.width + 1), last + 1)


class Lora(Parameters):
    """Low-rank adapters on the linear modules (Hu et al. 2021, arXiv 2106.09685), by peft; the base stays frozen."""

    name: ClassVar[str] = "lora"
    factors: ClassVar[bool] = True
    switchable: ClassVar[bool] = True

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
        present = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _adaptable(m)})
        if not present:
            some = sorted({type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))})
            raise InputError(
                f"The model has no linear module that LoRA could adapt; its weights are in {', '.join(some) or 'none'}.",
                "Use parameters=all or parameters=named.",
            )
        if targets != "all-linear":
            missing = [t for t in self.modules if t.rsplit(".", 1)[-1] not in present]
            if missing:
                raise InputError(
                    f"The model has no module {missing[0]!r} that LoRA could adapt.", f"It has {', '.join(present)}."
                )
        elif not hasattr(model, "get_output_embeddings"):
            raise InputError(
                "parameters.modules=all-linear is for language models of transformers.",
                f"Name the modules; this model has {', '.join(present)}: parameters.modules=[{present[0]}].",
            )
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class Fila(Lora):
    """A LoRA that begins as the part of each weight matrix that matters to the forget set and not to the retain set (LoKU).

    See :mod:`expunge.engine.fila` (Cha et al. 2024, arXiv 2408.06621). Fresh LoRA factors are zero on one side and reach any
    direction; these begin as a rank-r part of the weight itself, which is taken out of it: the base keeps ``W - alpha/r B A``,
    frozen. So the model is as it was at the start, and the base alone is *not* the target: it is saved beside the adapter, and
    terms that compare with the target need a copy of it. Factors beyond the smaller side of a matrix begin as those of a LoRA.

    The importances are computed as in the authors' code: squared gradients of means over batches, on as many retain examples as
    there are forget examples. The batch size, which they depend on, is not in the paper. Weight decay, 0.01 as published, shrinks
    the factors and with them a part of the weights.
    """

    name: ClassVar[str] = "fila"
    switchable: ClassVar[bool] = False
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE})

    batch: int = Field(16, ge=1, description="examples per batch whose gradient is squared")
    examples: int | None = Field(
        None, ge=1, description="retain examples that are looked at, at most; none: as many as there are forget examples"
    )

    def begin(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None = None) -> Any:
        """Wrap the model, compute both importances, and split every adapted matrix.

        Raises:
            InputError: nothing matches, a set is missing, the forget loss has no gradient, or a weight is shared or quantised.
        """
        for stream in self.reads:
            if not examples.get(stream):
                raise InputError(f"parameters=fila reads {stream} examples, but there are none.", f"Give a {stream} set.")
        wrapped = self.prepare(adapter.model, adapter.layers())
        adapted = {n: m for n, m in adapter.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        weights = {f"{name}.base_layer.weight": module.base_layer.weight for name, module in adapted.items()}
        check_own(adapter.model, weights)
        forget = list(examples[Stream.FORGET])
        retain = drawn(examples[Stream.RETAIN], self.examples or len(forget), engine.seed)
        wrapped.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)

        def progress(done: int, total: int) -> None:
            if tell is not None:
                tell(done, total, "importance of the weights, where the LoRA begins")

        found = relative_importance(adapter, forget, retain, batch=self.batch, tell=progress)
        wrapped.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for name, module in adapted.items():
                self._split(module, found[f"{name}.base_layer.weight"], engine.seed)
        for config in wrapped.peft_config.values():  # type: ignore[operator]
            config.base_model_name_or_path = OWN_BASE
        return wrapped

    def _split(self, module: Any, importance: Tensor, seed: int) -> None:
        """Move the part of one matrix that matters most from the frozen weight into the factors."""
        (name,) = module.active_adapters
        turned = bool(module.fan_in_fan_out)  # GPT-2 keeps its matrices as [inputs, outputs]
        weight = module.base_layer.weight
        a, b = factors(
            weight.T if turned else weight, importance.T if turned else importance, self.rank, module.scaling[name], seed
        )
        module.lora_A[name].weight[: len(a)] = a.to(module.lora_A[name].weight.dtype)
        module.lora_B[name].weight[:, : len(a)] = b.to(module.lora_B[name].weight.dtype)
        weight.sub_(module.get_delta_weight(name))


class Assistant(Lora):
    """A LoRA on a small model cut from the target: its first blocks, final norm and head (Ji et al. 2024, arXiv 2406.08607).

    The target itself stays as it is: what is learnt stands beside it, until ``finish=subtract`` joins the two. The small model
    has the target's own weights, not copies, so only the LoRA takes memory.
    """

    name: ClassVar[str] = "assistant"
    beside: ClassVar[bool] = True
    switchable: ClassVar[bool] = False
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ASSISTANT})

    blocks: int | None = Field(None, ge=1, description="blocks, from the first; none: a quarter of the target's (paper: 8 of 32)")
    rank: int = Field(16, ge=1, le=4096, description="rank r of the adapters")
    alpha: float = Field(32.0, gt=0, description="scale: the update is alpha / r * B A")

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Cut the small model out and wrap it with peft.

        Raises:
            InputError: the model has fewer blocks, or is wrapped already.
        """
        from expunge.adapters.assistant import first_blocks

        count = self.blocks or max(1, len(layers) // 4)
        wrapped = super().prepare(first_blocks(model, count), layers)
        wrapped.expunge_blocks = count  # type: ignore[assignment]
        return wrapped


class OffsetPair(Lora):
    """A LoRA on a small model whose difference from that model is added to the target's scores (arXiv 2404.11045).

    What is trained is the whole, ``z = z_target + w (z_small with LoRA - z_small)``, of which only the LoRA moves: it begins as
    the target exactly, and every loss sees the sum. It is the result too. The small model has the target's vocabulary.
    """

    name: ClassVar[str] = "offset-pair"
    beside: ClassVar[bool] = True
    joined: ClassVar[bool] = True
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ASSISTANT})

    small: str = Field("", description="small model with the target's tokenizer, folder or name; none: the target's first blocks")
    blocks: int | None = Field(None, ge=1, description="without a small model: how many blocks; none: a quarter of the target's")
    strength: float = Field(1.0, gt=0, le=64, description="w: of the difference, in training and after it")
    keep_target: bool = Field(True, description="save the target's weights with the result, or its name and their hash")

    def begin(self, adapter: Any, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None = None) -> Any:
        """Put both beside the target, and freeze all but the LoRA.

        Raises:
            InputError: the small model cannot be loaded, or is none of the target's family.
        """
        from expunge.adapters.offset import small_model

        return self._put(adapter.model, small_model(adapter, self.small) if self.small else None, adapter.layers())

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """The same with the model's own first blocks."""
        return self._put(model, None, layers)

    def _put(self, model: Any, small: Any, layers: Sequence[str]) -> nn.Module:
        from expunge.adapters.offset import put_beside

        blocks = None if small is not None else self.blocks or max(1, len(layers) // 4)
        tune = super().prepare
        return put_beside(model, small, lambda m: tune(m, layers), blocks, weight=self.strength, keep_target=self.keep_target)


class LoraBeside(Lora):
    """A LoRA that stands beside the target, which itself stays as it is: for ``finish=gate``.

    It is trained on a model of the target's own weights, not copies. Of a target that earlier requests put updates beside, these
    are not loaded meanwhile: each update is learnt on the target alone.
    """

    name: ClassVar[str] = "lora-beside"
    beside: ClassVar[bool] = True
    switchable: ClassVar[bool] = False
    extends: ClassVar[frozenset[str]] = frozenset({"gated"})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ASSISTANT})

    begins: Literal["fresh", "last"] = Field(
        "fresh",
        description="fresh: every request has an update of its own; last: the update of the request before goes on learning, and "
        "serves both",
    )

    def prepare(self, model: Any, layers: Sequence[str]) -> nn.Module:
        """Wrap a model of the same weights with peft.

        Raises:
            InputError: nothing matches, or the last update has other modules or another rank.
        """
        from expunge.adapters.assistant import first_blocks
        from expunge.adapters.gated import Gated

        target = model.target if isinstance(model, Gated) else model
        wrapped = super().prepare(first_blocks(target, len(layers)), layers)
        earlier = model.requests if isinstance(model, Gated) else []
        if self.begins == "last" and earlier:
            self._go_on(wrapped, earlier[-1].update)
        wrapped.expunge_continued = self.begins == "last" and bool(earlier)  # type: ignore[assignment]
        return wrapped

    def _go_on(self, wrapped: nn.Module, last: Any) -> None:
        from expunge.adapters.lowrank import LowRank

        held = LowRank.of(wrapped)
        shapes = [{n: (a.shape, b.shape, scale) for n, a, b, scale in u.pairs()} for u in (held, last)]
        if shapes[0] != shapes[1]:
            raise InputError(
                "The update of the request before has other modules, another rank or another scale than this one.",
                "Give the same parameters.rank, alpha and modules as then, or parameters.begins=fresh.",
            )
        with torch.no_grad():
            for mine, old in zip((*held.a, *held.b), (*last.a, *last.b), strict=True):
                mine.copy_(old)


class Twin(AllParameters):
    """Every parameter of a second copy of the target, which itself stays as it is: for ``finish=subtract``."""

    name: ClassVar[str] = "copy"
    beside: ClassVar[bool] = True
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ASSISTANT})

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Copy and unfreeze everything."""
        return super().prepare(copy.deepcopy(model), layers)


class SaliencyMask(AllParameters):
    """The weights that matter most to the forget loss, entry by entry; all others keep their value bit for bit.

    The mask is ``|d L / d theta| >= gamma`` at the target model, L the loss of the forget examples' own answers, with ``gamma``
    such that ``density`` of all entries pass (Fan et al. 2023, SalUn, arXiv 2310.12508). It is applied to the gradient before
    the optimiser sees it, and weight decay is off, so masked entries do not move at all. At density 1 it is ``all`` without
    weight decay.
    """

    name: ClassVar[str] = "mask"

    density: Annotated[float, Search(0.1, 0.9)] = Field(0.5, gt=0, le=1, description="share of the entries that may move")
    examples: int | None = Field(
        None,
        ge=1,
        description="forget examples from which the saliency is computed, at most, drawn at random; none: all, as published",
    )


class Pruned(AllParameters):
    """The weights that are left after pruning; the others are 0 and stay 0 (Jia et al. 2023, arXiv 2304.04934).

    Before training the share ``rate`` of the entries of smallest size, over all matrices together, is set to 0. Vectors
    (biases, norms) are not pruned and move. A model that is sparse already keeps its zeros, so ``rate`` up to its sparsity
    changes nothing else. At rate 0 it is ``all``. Other models that terms compare with (the reference) are those before
    pruning.
    """

    name: ClassVar[str] = "pruned"

    rate: float = Field(0.95, ge=0, lt=1, description="share of the entries that are set to 0")
    scope: Literal["matrices", "convolutions"] = Field(
        "matrices", description="which weights are pruned: all but vectors, or as published kernels of convolutions alone"
    )

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Prune.

        Raises:
            InputError: the model has no such weights.
        """
        super().prepare(model, layers)
        chosen = [p.detach() for p in model.parameters() if self._prunes(p)]
        if not chosen:
            raise InputError(f"The model has no {self.scope} that could be pruned.", "Choose another parameters.scope.")
        sizes = torch.cat([p.abs().flatten() for p in chosen])
        gone = round(self.rate * sizes.numel())
        if gone:
            limit = sizes.kthvalue(gone).values
            left = gone - int((sizes < limit).sum())  # of those exactly at the limit, so many go: the first
            for p in chosen:
                equal = (p.abs() == limit).flatten().nonzero().squeeze(1)[:left]
                left -= len(equal)
                p.masked_fill_(p.abs() < limit, 0.0)
                p[torch.unravel_index(equal, p.shape)] = 0.0
        return model

    def entries(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What is not 0, of the pruned weights."""
        if self.rate == 0:
            return []
        return [p.detach() != 0 if self._prunes(p) else torch.ones_like(p, dtype=torch.bool) for p in parameters]

    def _prunes(self, parameter: Tensor) -> bool:
        return parameter.ndim > (2 if self.scope == "convolutions" else 1)


class Reset(AllParameters):
    """All weights, after a share of the units of the last feed-forward layers has been set back to random ones (SANI, 2025).

    A unit is one output of the first matrix of a block's feed-forward part: its row there (with gates: in both matrices), its
    bias, and its column in the output matrix are drawn anew from N(0, std), the bias is 0. Units are chosen at random. Other
    models that terms compare with (the reference) are those before the reset. At share 0 it is ``all``.
    """

    name: ClassVar[str] = "reset"

    share: float = Field(0.5, ge=0, le=1, description="share of the units that are reset")
    layers: tuple[int, ...] = Field((-1,), min_length=1, description="blocks, counted from 0, negative from the end")
    std: float | None = Field(None, gt=0, description="of the new weights; none: the model's own initialiser, or 0.02")
    seed: int = Field(0, ge=0, description="of the choice of units and of their new weights")

    def prepare(self, model: nn.Module, layers: Sequence[str]) -> nn.Module:
        """Reset.

        Raises:
            InputError: there is no such block, or it has no feed-forward part that is known.
        """
        super().prepare(model, layers)
        own = getattr(getattr(model, "config", None), "initializer_range", None)
        std = self.std or (own if isinstance(own, float) else 0.02)
        generator = torch.Generator().manual_seed(self.seed)
        for block in dict.fromkeys(layers[block_index(i, layers)] for i in self.layers):
            feed = FeedForward.of(model.get_submodule(block), block)
            order = torch.randperm(feed.units, generator=generator)
            feed.reset(order[: round(self.share * feed.units)], std, generator)
        return model


for choice in (
    AllParameters, NamedParameters, LayerWindow, Lora, Fila, Assistant, OffsetPair, LoraBeside, Twin, SaliencyMask, Pruned, Reset,
    ProjectedStates,
):  # fmt: skip
    PARAMETERS.add(choice.name, choice)
