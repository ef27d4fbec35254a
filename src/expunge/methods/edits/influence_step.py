"""Influence approximation: one step against the forget set, corrected by the retain set."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter
from expunge.core.access import Stream
from expunge.engine.edit import Edit, Examples, Tell
from expunge.engine.gradients import mean_gradient, moving
from expunge.engine.options import Engine
from expunge.engine.parts import Paper
from expunge.methods.edits.registry import edit

_EPSILON = 1e-8  # of Adam


@edit
class IAU(Edit):
    """Forgetting a point is approximated by learning one with the opposite gradient: a single step, no inverse Hessian.

    The direction is ``g = grad mean NLL(retain) - grad mean NLL(forget)``, each mean over its own set. The published step is the
    first of Adam, which is the *sign* of g times the rate: it moves every weight by the rate, however small g is at an optimum.
    ``step=sgd`` takes ``lr * g`` instead. The paper also restricts gradients in training, so that a step suffices: that is
    ``expunge.Training(restriction=0.005)`` for the target and what it is compared with, and may be left out.
    """

    name: ClassVar[str] = "iau"
    title: ClassVar[str] = "Influence approximation unlearning"
    paper: ClassVar[Paper] = Paper(
        "Efficient Machine Unlearning via Influence Approximation", "Jiawei Liu, Chenwang Wu, Defu Lian, Enhong Chen", 2025,
        "https://arxiv.org/abs/2507.23257",
    )  # fmt: skip
    formula: ClassVar[str] = "theta <- theta - lr sign(g), g = grad mean NLL(retain) - grad mean NLL(forget)"
    caveats: ClassVar[tuple[str, ...]] = (
        "A sign step moves weights that have nothing to do with the forget set as far as those that have.",
        "Restricted training fits more slowly: on digits rows had smaller gradients at equal loss, not after equal steps.",
    )

    step: Literal["adam", "sgd"] = Field("adam", description="a sign step of size lr in every weight, or lr times the gradient")
    lr: float = Field(1e-3, gt=0, description="size of the step")
    correction: bool = Field(True, description="subtract the gradient of the retain set, so that less is lost there")

    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """One full-batch step."""
        g = {n: -v for n, v in mean_gradient(adapter, examples[Stream.FORGET], engine.max_tokens).items()}
        if tell is not None:
            tell(1, 2, "gradient of the forget set")
        if self.correction:
            for name, value in mean_gradient(adapter, examples[Stream.RETAIN], engine.max_tokens).items():
                g[name] = g[name] + value
        if tell is not None:
            tell(2, 2, "gradient of the retain set")
        out = {}
        for name, parameter in moving(adapter.model).items():
            direction = g[name] / (g[name].abs() + _EPSILON) if self.step == "adam" else g[name]
            out[name] = parameter.detach() - self.lr * direction
        return out
