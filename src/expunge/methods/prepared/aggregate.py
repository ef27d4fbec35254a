"""Several models as one: what an ensemble of shards says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.engine.functional import Forward

Rule = Literal["probabilities", "vote", "logits"]


class Aggregate(nn.Module):
    """The joint answer of some models, as scores ``[rows, classes]`` that an audit reads like those of one model.

    ``probabilities``: the logarithm of the mean of the members' softmax. ``vote``: each member votes for its first class; the
    score of a class is ``log((votes + 1/C) / (members + 1))``, finite where nobody votes for it, and a tie goes to the class that
    comes first. ``logits``: the mean of the scores, for numbers too.

    Args:
        members: one or more models of the same task.
        rule: how their scores are joined.
        forward: how each is called.

    Raises:
        InputError: there is no member.
    """

    def __init__(self, members: Sequence[nn.Module], rule: Rule, forward: Forward) -> None:
        super().__init__()
        if not members:
            raise InputError("There is no model to ask.", "Train anew.")
        self.members = nn.ModuleList(members)
        self.rule, self._forward = rule, forward

    def member_scores(self, inputs: Any) -> Tensor:
        """Scores of every member, ``[members, rows, classes]``."""
        return torch.stack([self._forward(member, inputs) for member in self.members])

    def votes(self, inputs: Any) -> Tensor:
        """The first class of every member, ``[rows, members]``: what post-processing for equal error rates reads."""
        return self.member_scores(inputs).argmax(-1).T

    def forward(self, inputs: Any) -> Tensor:
        """The joint scores, ``[rows, classes]``."""
        scores = self.member_scores(inputs)
        if self.rule == "probabilities":
            return scores.log_softmax(-1).logsumexp(0) - torch.log(torch.tensor(float(len(scores))))
        if self.rule == "logits":
            return scores.mean(0)
        classes = scores.shape[-1]
        votes = torch.zeros_like(scores[0])
        for member in scores:
            votes.scatter_add_(-1, member.argmax(-1, keepdim=True), torch.ones_like(votes[..., :1]))
        return ((votes + 1 / classes) / (len(scores) + 1)).log()
