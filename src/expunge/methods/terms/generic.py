"""Fine-tuning on labels that a preparation chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term

MADE = "generic-labels"  #: name under which a preparation makes labels: a mapping of example id to class ids ``[targets]``
DROPPED = -100  #: label of a target that is left out


@term
class GenericNLL(Term):
    """Cross-entropy of the forget targets to generic labels, ``-log p(label)``: the last step of Who's Harry Potter.

    Targets that are left out have the value 0. They count in the mean, so that the count does not depend on what was prepared.
    """

    name: ClassVar[str] = "generic-nll"
    uses: ClassVar[frozenset[str]] = frozenset({MADE})
    selective: ClassVar[bool] = False  # the labels are those of whole examples

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the current model."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """One loss per target, ``[N]``."""
        view = views.current(Stream.FORGET)
        labels = torch.cat([views.made[MADE][name] for name in view.batch_ids]).to(view.logits.device)
        return functional.cross_entropy(view.logits, labels, reduction="none", ignore_index=DROPPED)
