"""Maximum entropy: a loss term and the method made of it."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Paper, Recipe, Term, Views
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method, term
from expunge.methods.terms.likelihood import NLL

CLOSER = Paper(
    "A Closer Look at Machine Unlearning for Large Language Models",
    "Xiaojian Yuan, Tianyu Pang, Chao Du, Kejiang Chen, Weiming Zhang, Min Lin",
    2024,
    "https://arxiv.org/abs/2410.08109",
)


@term
class MaximumEntropy(Term):
    """``KL(p || uniform) = log V - H(p)`` per target, in [0, log V]: the model is to know nothing better than a guess."""

    name: ClassVar[str] = "maximum-entropy"
    stream: ClassVar[Stream] = Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the forget targets under the model being changed."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """One value per target, ``[N]``."""
        logp = views.current(Stream.FORGET).logits.log_softmax(-1)
        return math.log(logp.shape[-1]) + (logp.exp() * logp).sum(-1)


@method(
    "me",
    title="Maximum entropy",
    paper=CLOSER,
    formula="L = 0.1 mean_tokens (log V - H(p))(forget) + NLL(retain)",
    published=Fixed(lr=1e-5, epochs=5),
    with_paper={"retain": {"reduction": "token"}},
)
def me() -> Recipe:
    """Flatten the predictions of the forget answers, keep the likelihood of the retain set."""
    return compose("me", forget=[MaximumEntropy(weight=0.1)], retain=[NLL()])
