"""Reading hidden states as if they were the last: what do layers still say of an answer that the model no longer gives?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from expunge.audit.attacks.inside import StatementAttack, target_of
from expunge.audit.attacks.registry import attack
from expunge.audit.evidence import Evidence
from expunge.audit.metrics.papers import LOGIT_LENS, TUNED_LENS
from expunge.audit.probes import take_clusters
from expunge.audit.reader import Reader
from expunge.audit.statements import Statement, facts, statement_means, states_of, tokens_of
from expunge.core.intervals import Floats
from expunge.engine.parts import Paper


@attack
class LogitLens(StatementAttack):
    """Each layer's hidden state through the model's own final norm and head: what the layer that says most says of the answer.

    nostalgebraist (2020). The value is the mean log-probability of the tokens that tell the true answer from false ones,
    minus the same of the false ones, at the layer where this is largest; retrained models have the same choice of a layer.
    What is read is the answer itself, given up to the token before: the published form reads the first token only, which in
    an answer that is a sentence repeats the question. Early layers of a model may use another basis than its head reads; see
    the tuned lens.
    """

    name: ClassVar[str] = "logit-lens"
    title: ClassVar[str] = "Logit lens"
    formula: ClassVar[str] = "max_l [log p_l(true) - mean log p_l(false)], p_l = softmax(head(norm(h_l)))"
    paper: ClassVar[Paper] = LOGIT_LENS
    passes: ClassVar[str] = "1 + wrong forward passes, and the head once per layer"

    def measure(self, evidence: Evidence, label: str, statements: Sequence[Statement]) -> Floats:
        """Mean log-probability of each statement at each layer."""
        adapter = evidence.adapter(label)
        reader, tokens = Reader(adapter), tokens_of(statements)
        states = states_of(adapter, statements, adapter.layers(), evidence.protocol.batch_tokens)
        said = [reader.log_probabilities(layer, tokens)[0] for layer in states.values]
        return statement_means(torch.stack(said).double().numpy(), statements)


@attack
class TunedLens(StatementAttack):
    """One linear lens per layer, fitted on the target's retain data and used for all models alike, read by the target's head.

    Belrose et al. (2023), with a ridge regression instead of training: ``h_L ~ A_l h_l + b_l`` on the states of the *target*
    at the answers of retain records. A lens fitted for each model anew could learn what the model has forgotten; this one
    cannot, for it never sees a forget record and is the same for all. It reads models that began at the target's weights;
    what a retrained model that began elsewhere holds is noise to it, which is why false answers are subtracted. Only the
    tokens that tell answers apart count.
    """

    name: ClassVar[str] = "tuned-lens"
    title: ClassVar[str] = "Tuned lens of the target"
    formula: ClassVar[str] = "max_l [log p_l(true) - mean log p_l(false)], p_l = softmax(head_T(norm_T(A_l h_l + b_l)))"
    paper: ClassVar[Paper] = TUNED_LENS
    passes: ClassVar[str] = "1 + wrong forward passes; once per layer a pass of the target over retain examples"

    ridge: float = Field(1e-3, gt=0, description="strength of the ridge, as a share of the states' mean square")
    retain_examples: int = Field(256, ge=8, description="retain records on which the lens is fitted, at most")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target and retain records."""
        if not target_of(evidence) or "retain" not in evidence.sets:
            return "it needs a target model and a retain set"
        return super().lacks(evidence, name)

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def measure(self, evidence: Evidence, label: str, statements: Sequence[Statement]) -> Floats:
        """Mean log-probability of each statement at each layer, read by the target."""
        at, adapter = evidence.protocol, evidence.adapter(label)
        states = states_of(adapter, statements, adapter.layers(), at.batch_tokens).values
        adapter = evidence.adapter(target_of(evidence))
        chosen = take_clusters(evidence.clusters("retain"), self.retain_examples, at.seed)
        read = [f.right for f in facts(adapter, evidence.records("retain"), chosen.tolist(), 0)]
        reader, tokens, layers = Reader(adapter), tokens_of(statements), adapter.layers()
        said = []
        for index, layer in enumerate(layers):
            # One layer at a time, so that the states of two layers are the most that is held of the retain set.
            pair = states_of(adapter, read, [layer, layers[-1]], at.batch_tokens).values
            matrix, offset = fit_lens(pair[0], pair[1], self.ridge)
            moved = states[index].double() @ matrix + offset
            said.append(reader.log_probabilities(moved.to(states.dtype), tokens)[0])
        return statement_means(torch.stack(said).double().numpy(), statements)


def fit_lens(states: Tensor, last: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with an offset that is not shrunk: ``last ~ states @ matrix + offset``, in float64.

    Args:
        states: of a layer ``[R, D]``.
        last: of the last layer at the same tokens ``[R, D]``.
        ridge: added to the diagonal of the states' covariance, as a share of its mean.

    Returns:
        matrix ``[D, D]``, offset ``[D]``.
    """
    x, y = states.double(), last.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp(min=1e-12))
    matrix = torch.linalg.solve(covariance, x.T @ y / len(x))
    return matrix, mean_y - mean_x @ matrix
