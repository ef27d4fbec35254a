"""Edits by second derivatives: noise where the retain set does not mind, and the influence of the forget set taken out."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.edit import Edit, Examples, Tell
from expunge.engine.functional import flatten, unflatten
from expunge.engine.gradients import fitting, mean_gradient, moving
from expunge.engine.importance import diagonal_importance
from expunge.engine.options import Engine
from expunge.engine.parts import Paper
from expunge.engine.solve import conjugate_gradient, empirical_fisher_solve, gauss_newton_product, hessian_product
from expunge.methods.edits.registry import edit

Batches = list[tuple[dict[str, Tensor], Tensor]]

_EXACT = 16  # classes up to which all are gone through
_FLOOR = 1e-8  # weights that do not matter at all get a large but finite noise


def row_batches(adapter: Adapter, examples: list[Example], max_units: int) -> Batches:
    """Input tensors and targets of some rows, in batches that fit."""
    device = next(adapter.model.parameters()).device
    made = (adapter.collate(chosen).to(device) for chosen in fitting(examples, max_units))
    return [(dict(b.tensors), b.targets) for b in made]


@edit
class Fisher(Edit):
    """Noise on every weight, the larger the less the retain set depends on it: what only the forget set needed drowns.

    The paper's optimal noise has the standard deviation ``alpha F^(-1/4)``, F the diagonal Fisher information of the retain set
    (squared gradients of all labels, weighted by the model's own probabilities; in one pass, see ``labels``). The official code
    takes ``sqrt(alpha min(1/F, cap))`` instead, an exponent of -1/2, and treats the last layer apart; ``form=official`` is that
    without the special cases. The forget set itself is not read.
    """

    name: ClassVar[str] = "fisher"
    title: ClassVar[str] = "Fisher forgetting"
    paper: ClassVar[Paper] = Paper(
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "Aditya Golatkar, Alessandro Achille, Stefano Soatto",
        2020,
        "https://arxiv.org/abs/1911.04933",
    )
    formula: ClassVar[str] = "theta <- theta + alpha F^(-1/4) N(0, I), F = E_retain sum_y p(y|x) (d log p(y|x) / d theta)^2"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.CLASSES, Offer.ROWS})
    streams: ClassVar[tuple[Stream, ...]] = (Stream.RETAIN,)
    caveats: ClassVar[tuple[str, ...]] = (
        "The noise is drawn anew for each seed: judge it over several.",
        "Too little noise forgets nothing and too much ruins the model; between the two there may be no good value.",
    )

    alpha: float = Field(1e-3, ge=0, description="size of the noise; the official code's form takes 1e-9 to 1e-5")
    form: Literal["paper", "official"] = Field("paper", description="exponent -1/4 of the paper, or -1/2 of the official code")
    cap: float = Field(1e3, gt=0, description="with form=official: largest value of 1/F")
    labels: Literal["auto", "all", "drawn"] = Field(
        "auto",
        description="exactly over all classes, at a backward pass for each but one; or by one class drawn for each row, at one "
        "backward pass whatever their number is; auto: exactly up to 16 classes",
    )

    def deviation(self, fisher: Tensor) -> Tensor:
        """Standard deviation of the noise for a Fisher information, elementwise."""
        if self.form == "official":
            return (self.alpha * (1 / (fisher + _FLOOR)).clamp(max=self.cap)).sqrt()
        return self.alpha * (fisher + _FLOOR).pow(-0.25)

    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """The weights with noise."""
        batches = row_batches(adapter, list(examples[Stream.RETAIN]), engine.max_tokens)
        if tell is not None:
            tell(0, 1, "Fisher information of the retain set")
        exact = self.labels == "all" or (self.labels == "auto" and (adapter.n_classes or 0) <= _EXACT)
        found = diagonal_importance(
            adapter.model, batches, adapter.scores, adapter.row_losses, estimator="sample",
            labels="model" if exact else "sampled", seed=engine.seed,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(engine.seed)
        out = {}
        for name, parameter in moving(adapter.model).items():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32).to(parameter.device, parameter.dtype)
            out[name] = parameter.detach() + self.deviation(found[name]).to(parameter.dtype) * noise
        return out


@edit
class Influence(Edit):
    """The change of the optimum that leaving the forget set out would make, to first order: an inverse Hessian, once.

    ``v = (1/n) (sum_F grad l - |F|/|R| sum_R grad l)`` and ``H`` the curvature on the retain set. ``fisher`` inverts the
    empirical Fisher matrix of up to ``samples`` retain rows plus ``damping``, which is what the recursion of WoodFisher states;
    the one-vector recursion of the paper's code is not that inverse and is not followed. ``hessian`` and ``gauss-newton``
    solve by conjugate gradients. On a model that is linear in its weights, at its optimum and with its exact
    Hessian, alpha 1 is the Newton step of certified removal.
    """

    name: ClassVar[str] = "influence"
    title: ClassVar[str] = "Influence unlearning"
    paper: ClassVar[Paper] = Paper(
        "Model Sparsity Can Simplify Machine Unlearning",
        "Jinghan Jia, Jiancheng Liu, Parikshit Ram, Yuguang Yao, Gaowen Liu, Yang Liu, Pranay Sharma, Sijia Liu",
        2023,
        "https://arxiv.org/abs/2304.04934",
    )
    formula: ClassVar[str] = "theta <- theta + alpha (H + damping I)^-1 (1/n) (sum_F grad l - |F|/|R| sum_R grad l)"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.ROWS})
    caveats: ClassVar[tuple[str, ...]] = (
        "alpha is tuned for each model (the literature takes 1 to 20); far from an optimum the step means little.",
        "curvature=hessian needs positive curvature: on deep networks use gauss-newton or fisher, with damping.",
    )

    alpha: float = Field(1.0, gt=0, description="length of the step")
    curvature: Literal["fisher", "gauss-newton", "hessian"] = Field("fisher", description="which matrix is inverted")
    damping: float = Field(1.0, ge=0, description="added to every eigenvalue; above 0 for fisher")
    samples: int = Field(1000, ge=1, description="retain rows on which curvature is taken, at most")
    tolerance: float = Field(1e-6, gt=0, lt=1, description="of conjugate gradients: residual by which they end")

    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """The weights after the step."""
        forget, retain = list(examples[Stream.FORGET]), list(examples[Stream.RETAIN])
        gradients = [mean_gradient(adapter, held, engine.max_tokens) for held in (forget, retain)]
        share = len(forget) / (len(forget) + len(retain))
        # (1/n) (sum_F - |F|/|R| sum_R) in terms of the means of both sets.
        v = flatten({name: share * (gradients[0][name] - gradients[1][name]) for name in gradients[0]})
        if tell is not None:
            tell(1, 2, "gradients of both sets")
        order = np.random.default_rng([engine.seed, 23]).permutation(len(retain))[: self.samples]
        batches = row_batches(adapter, [retain[int(i)] for i in sorted(order)], engine.max_tokens)
        step = self._solve(adapter, batches, v)
        if tell is not None:
            tell(2, 2, "inverse curvature")
        change = unflatten(step, gradients[0])
        return {n: p.detach() + self.alpha * change[n].to(p.dtype) for n, p in moving(adapter.model).items()}

    def _solve(self, adapter: Adapter, batches: Batches, v: Tensor) -> Tensor:
        arguments = (adapter.model, batches)
        if self.curvature == "fisher":
            return empirical_fisher_solve(*arguments, v, adapter.scores, adapter.row_losses, damping=self.damping)
        product = gauss_newton_product if self.curvature == "gauss-newton" else hessian_product
        apply = product(*arguments, adapter.scores, adapter.row_losses)
        found = conjugate_gradient(apply, v, damping=self.damping, tolerance=self.tolerance)
        if not found.converged:
            raise InputError(
                f"Conjugate gradients ended with a residual of {found.residual:.1e} after {found.steps} steps.",
                "Raise damping or tolerance; nothing was changed.",
            )
        return found.vector
