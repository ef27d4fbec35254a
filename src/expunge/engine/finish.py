"""What is made of the trained module at the end: other weights, or a model that holds the target too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.combination import Combination
from expunge.adapters.detector import Weighing
from expunge.core.errors import InputError
from expunge.core.registry import Registry
from expunge.engine import checkpoint
from expunge.engine.parts import Finish, Join, Recipe, Reweigh

#: What is said where what was trained reached the goal and the model that was joined does not.
BEHIND = (
    "What was trained reached the goal after {steps} steps, but the model that it makes with the target does not "
    "({side}; goal {goal}). Look at the notes on what decides between the two."
)
FINISHES: Registry[type[Finish]] = Registry("finish", None, "expunge.finishes")


class Negate(Reweigh):
    """Task-vector negation: ``theta - scale * (theta_trained - theta)`` (Ilharco et al. 2022, arXiv 2212.04089).

    At scale 0 it is the identity, at scale -1 the trained weights. A LoRA is merged into its weights before: a product of two
    factors is not turned around by turning each of them.
    """

    name: ClassVar[str] = "negate"

    scale: float | None = Field(None, ge=-1, le=64, description="coefficient of the task vector; none: the schedule finds it")

    def weights(self, before: Tensor, after: Tensor, scale: float) -> Tensor:
        """``before - scale * (after - before)``, computed in float32 or wider and returned in the type of ``before``."""
        return _towards(before, after, -scale)


class NegateSum(Negate):
    """Task-vector negation of several requests together: ``theta_0 - scale * (theta_trained - theta_0)``.

    ``theta_0`` are the weights before the first request. Training goes on from where that of the last request ended, not from
    the model that it left, so the task vectors of all requests add up before they are turned around (Dou et al. 2024, Stable
    Sequential Unlearning, arXiv 2406.10952). The weights that know what was forgotten are computed again from the model that
    the last request left and ``theta_0``; they are never kept. Of one request it is ``negate``.
    """

    name: ClassVar[str] = "negate-sum"
    accumulates: ClassVar[bool] = True


@dataclass(frozen=True)
class Origin:
    """Where requests that add up began.

    Attributes:
        weights: before the first request, by name.
        scale: at which the last request turned around what was learnt up to it; not 0.
    """

    weights: Mapping[str, Tensor]
    scale: float


class Ending:
    """Remembers what a finish needs of the weights before training, and puts the model where training begins.

    Args:
        recipe: whose finish it is; without one nothing is done.
        model: as it was given, before parameters are chosen. With an ``origin`` its weights are changed to those at which the
            training of the last request ended.
        origin: of a row of requests; none: this is the first.
        sharded: whether a process holds parts of the weights only.

    Raises:
        InputError: an origin of another shape, or weights that are needed whole on a sharded model.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, origin: Origin | None, *, sharded: bool) -> None:
        self.whole: checkpoint.Tensors = {}
        finish = recipe.finish
        if not isinstance(finish, Reweigh):
            return
        origin = origin if finish.accumulates else None
        if sharded and (origin is not None or recipe.parameters.factors):
            raise InputError(
                f"finish={finish.name} reads whole weights, which a process of a sharded (FSDP) model lacks.",
                "Run it on one process or with data parallelism.",
            )
        if origin is not None:
            self._go_on(model, origin)
        elif recipe.parameters.factors:
            self.whole = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}

    def _go_on(self, model: nn.Module, origin: Origin) -> None:
        held = dict(model.named_parameters())
        if differing := sorted(n for n in {*held, *origin.weights} if not _alike(held.get(n), origin.weights.get(n))):
            raise InputError(
                f"The model before the first request differs in shape from this one (in {differing[0]!r}).",
                "Give the model that the requests began with.",
            )
        self.whole = {n: w.detach().to("cpu", copy=True) for n, w in origin.weights.items()}
        with torch.no_grad():
            for name, parameter in held.items():
                first = self.whole[name].to(parameter.device)
                parameter.copy_(_towards(first, parameter, -1.0 / origin.scale))

    def before(self, model: nn.Module) -> checkpoint.Tensors:
        """The weights that the finish takes for those before training: all, or those of ``model`` that move."""
        return self.whole or checkpoint.snapshot(model)

    def joined(self, model: nn.Module) -> nn.Module:
        """The trained model as the finish changes it: with a LoRA merged, and all weights free if all are changed."""
        merge: Any = getattr(model, "merge_and_unload", None)
        plain: nn.Module = merge() if callable(merge) else model
        return plain.requires_grad_(True) if self.whole else plain


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def _towards(start: Tensor, end: Tensor, share: float) -> Tensor:
    """``start + share * (end - start)`` in float32 or wider, returned in the type of ``start``."""
    wide = torch.promote_types(start.dtype, torch.float32)
    first = start.to(wide)
    return (first + share * (end.to(wide) - first)).to(start.dtype)


class Subtract(Join):
    """The scores of the trained assistant are taken from the target's: ``z_target - scale f(z_assistant - z_baseline)``.

    The result is both models as one (:class:`expunge.adapters.combined.Combined`). The scale is found by halving, as the smallest
    with which the loss on the forget set reaches the goal while the loss on the retain set stays within the schedule's bound.
    """

    name: ClassVar[str] = "subtract"
    takes: ClassVar[tuple[str, ...]] = ("assistant", "copy")

    scale: float | None = Field(None, ge=0, le=64, description="weight that is taken away; none: the schedule finds it")
    link: Literal["identity", "relu"] = Field("identity", description="f: relu takes scores that rose and leaves the rest alone")
    against: Literal["none", "target"] = Field("none", description="z_baseline: none, or the target's own scores")
    centred: bool = Field(True, description="take the mean over the vocabulary out of the assistant's scores")
    filter: float | None = Field(
        None, gt=0, lt=1, description="only tokens at least so likely as this share of the target's likeliest; none: all"
    )
    keep_target: bool = Field(True, description="save the target's weights with the result, or its name and their hash")

    def join(self, target: nn.Module, trained: nn.Module, made: Mapping[str, Any]) -> nn.Module:
        """Both as one, with nothing taken away yet."""
        from expunge.adapters.combined import Combined

        blocks = getattr(trained, "expunge_blocks", None)
        return Combined(target, trained, self.combination(0.0), blocks=blocks, keep_target=self.keep_target)

    def place(self, joined: Any, scale: float) -> str:
        """Take ``scale`` times the assistant's scores away."""
        joined.combination = self.combination(scale)
        return f"The assistant's scores are taken away with weight {scale:.4g}."

    def combination(self, scale: float) -> Combination:
        """The formula at a strength."""
        return Combination(
            weight=-scale, link=self.link, against=self.against, centred=self.centred, filter=self.filter
        )  # fmt: skip


class Gate(Join, Weighing):
    """The trained LoRA is loaded for an input as far as a detector finds it near to what is to be forgotten (O3).

    The result is the target with the LoRA and the detector (:class:`expunge.adapters.gated.Gated`); joined to what an earlier
    request left, it holds both requests. The scale multiplies all weights of the request. None: the schedule looks for the
    smallest, up to 2, with which the forget set as a whole reaches the goal, prompts that the detector misses included.
    """

    name: ClassVar[str] = "gate"
    reverses: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ("lora-beside",)
    uses: ClassVar[frozenset[str]] = frozenset({"detector"})
    most: ClassVar[float] = 2.0

    scale: float | None = Field(None, ge=0, le=2, description="factor of all weights; none: the schedule finds it")
    keep_target: bool = Field(True, description="save the target's weights with the result, or its name and their hash")

    def join(self, target: nn.Module, trained: nn.Module, made: Mapping[str, Any]) -> nn.Module:
        """Target, what earlier requests put beside it, and the LoRA."""
        from expunge.adapters.gated import Gated, GatedRequest
        from expunge.adapters.lowrank import LowRank

        held = made["detector"]
        request = GatedRequest(
            LowRank.of(trained), held.detector.to(next(target.parameters()).device), self.weighing(), strength=0.0,
            continued=bool(getattr(trained, "expunge_continued", False)), reading=held.reading,
        )  # fmt: skip
        inner, before, encoder = target, [], held.encoder
        if isinstance(target, Gated):
            inner, before, encoder = target.target, target.requests, held.encoder or target.encoder
        return Gated(inner, [*before, request], encoder=encoder, tokenizer=held.tokenizer, keep_target=self.keep_target)

    def weighing(self) -> Weighing:
        """Its own fields that say how the weight of an input is made."""
        return Weighing(**{key: getattr(self, key) for key in Weighing.model_fields})

    def place(self, joined: Any, scale: float) -> str:
        """Load the LoRA of the last request with weights of at most ``scale``."""
        joined.requests[-1].strength = scale
        joined.describe()
        return f"What was learnt is loaded with up to {scale:.4g} times its strength, as the detector says."


def turned_around(recipe: Recipe) -> bool:
    """Whether what is trained is taken away at the end: then training itself does not approach the goal."""
    return recipe.finish is not None and recipe.finish.reverses


def behind(recipe: Recipe, goal: float | None, forget_loss: float | None) -> bool:
    """Whether the model that a finish joined has not reached the goal, which what was trained had."""
    return isinstance(recipe.finish, Join) and goal is not None and forget_loss is not None and forget_loss < goal


def join_of(recipe: Recipe, target: nn.Module, trained: nn.Module, made: Mapping[str, Any], *, sharded: bool) -> nn.Module | None:
    """The model that holds the target and what a recipe trains beside it; none if it trains the target itself.

    ``made`` is what the preparation made.

    Raises:
        InputError: the two do not fit together, or the trained one is sharded.
    """
    if not isinstance(recipe.finish, Join):
        return None
    if sharded:
        raise InputError(f"The method {recipe.name!r} trains a model beside the target.", "Run it without sharding (FSDP).")
    return recipe.finish.join(target, trained, made)


for kind in (Negate, NegateSum, Subtract, Gate):
    FINISHES.add(kind.name, kind)
