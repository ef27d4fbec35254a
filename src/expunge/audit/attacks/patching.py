"""Activation patching: how deep was an answer removed? The model's hidden states are put into the target, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch
from expunge.adapters.head import base
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.inside import StatementAttack, record_number, target_of
from expunge.audit.attacks.registry import Access, attack
from expunge.audit.evidence import Evidence
from expunge.audit.kernel.depth import depth_score
from expunge.audit.metrics.papers import DEPTH_SCORE
from expunge.audit.statements import Statement, States, batches, places, spans, statement_means, states_of
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.engine.covariance import cells
from expunge.engine.parts import Paper


@attack
class ActivationPatching(StatementAttack):
    """The model's hidden states patched into the target: what of the answer is lost, layer by layer (Unlearning Depth Score).

    After each layer in turn, the states of the model under audit take the place of the target's at the tokens that predict
    the telling part of the answer; the target goes on from there. ``D_l`` is what the target's log-probability of the true
    answer (against false ones) loses by it. Where it loses nothing, the model's state still holds the answer. The value is
    the mean of ``D_l`` over layers: 0 for the target itself. The depth score of a model, between 0 (as the target) and 1 (as
    retrained models), is given beside it: of the layers where retrained models lose more than ``threshold``, the share of
    their loss that this model shows. Retrained models that began at other random weights break the target as much as noise
    would; only in contrast with false answers can they be compared, and then the score says "holds as little as they do".
    """

    name: ClassVar[str] = "activation-patching"
    title: ClassVar[str] = "Activation patching"
    formula: ClassVar[str] = (
        "mean_l D_l; UDS = sum_KE R_l clip(D_l / R_l, 0, 1) / sum_KE R_l, R_l of retrained models, KE = {l: R_l > threshold}"
    )
    paper: ClassVar[Paper] = DEPTH_SCORE
    access: ClassVar[Access] = Access.BOTH
    passes: ClassVar[str] = "(1 + wrong) (2 + layers) forward passes"
    toward = -1

    tokens: Literal["all", "answer"] = Field(
        "all",
        description="where states are exchanged: at all tokens, or, as published, at those that predict what tells answers apart",
    )
    threshold: float = Field(0.05, ge=0, description="layers count where retrained models lose more than this, in nats per token")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target."""
        return super().lacks(evidence, name) if target_of(evidence) else "it needs the target model"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def measure(self, evidence: Evidence, label: str, statements: Sequence[Statement]) -> Floats:
        """What the target loses of each statement's log-probability per token, after each layer."""
        adapter, tokens = evidence.adapter(label), evidence.protocol.batch_tokens
        states = states_of(adapter, statements, adapter.layers(), tokens, whole=self.tokens == "all")
        return lost_by_patching(evidence.adapter(target_of(evidence)), statements, states, tokens)

    def reduce(self, layers: Floats) -> Floats:
        """The mean over layers."""
        return np.asarray(layers.mean(axis=0), dtype=np.float64)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The mean loss and, where there are other retrained models, the depth score."""
        out = super().compute(evidence, label)
        for name in evidence.sets:
            others = evidence.labels("retrained", but=label)
            if f"{name}.{self.name}" not in out or not others:
                continue
            own = self.arrays(evidence, label, name)["layers"]
            held = [h for o in others if len(h := self.arrays(evidence, o, name)["layers"]) == len(own)]
            if not len(own) or not held:
                continue
            score = depth_score(own, np.mean(held, axis=0), self.threshold)
            note = (
                "Unlearning Depth Score: 0 = hidden states hold the answer as the target's do, 1 = as little as retrained models'"
            )
            number = record_number(evidence, name, score, Direction.REFERENCE, range=(0.0, 1.0), note=note)
            if number is not None:
                out[f"{name}.{self.name}.depth"] = number
        return out


@torch.no_grad()
def lost_by_patching(target: Adapter, statements: Sequence[Statement], states: States, batch_tokens: int) -> Floats:
    """Mean log-probability per looked-at token that the target loses with foreign states after each layer, ``[L, statements]``.

    Args:
        target: whose later layers go on from the patched states; left as it is.
        statements: what is looked at.
        states: of the other model, at the tokens that are to be exchanged, after each layer.
        batch_tokens: per forward pass.

    Raises:
        InputError: the models differ in depth or width.
    """
    layers, (depth, _, width) = target.layers(), states.values.shape
    own = getattr(base(target.model).config, "hidden_size", width)
    if len(layers) != depth or width != own:
        raise InputError(
            f"its hidden states are {depth} layers of {width} numbers, the target's {len(layers)} of {own}.",
            "Activation patching needs models of one shape.",
        )
    looked = States(torch.empty(0), tuple(s.length for s in statements), whole=False)
    lost = torch.zeros(depth, sum(looked.counts), dtype=torch.float64)
    want = frozenset({"losses", f"features:{layers[-1]}"})  # with features of the last layer all tokens are run
    with evaluating(target.model):
        for chosen, batch in batches(target, statements, batch_tokens):
            some = [statements[i] for i in chosen]
            rows, at = places(batch, some, whole=states.whole), spans(batch, some)[1]
            clean = target.forward(target.model, batch, want).losses[at]
            for index, layer in enumerate(layers):
                with patched(target, layer, batch, rows, states.values[index, states.rows(chosen)]):
                    found = target.forward(target.model, batch, want).losses[at]
                lost[index, looked.rows(chosen)] = (found - clean).double().cpu()
    return statement_means(lost.numpy(), statements)


@contextmanager
def patched(adapter: Adapter, layer: str, batch: Batch, rows: Tensor, values: Tensor, *, added: bool = False) -> Iterator[None]:
    """While open, the residual stream after ``layer`` is ``values`` ``[R, D]`` at the real tokens ``rows`` of the batch.

    With ``added`` it is what it was and ``values`` more; where these are 0 it is left bit by bit.
    """
    module: nn.Module = base(adapter.model).get_submodule(layer)

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        flat = states.reshape(-1, states.shape[-1]).clone()
        where = cells(batch, states)
        at = rows if where is None else where[rows]
        flat[at] = flat[at] + values.to(flat) if added else values.to(flat)
        changed = flat.view(states.shape)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
