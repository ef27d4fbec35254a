"""A term on one more class than there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parameters import block_index
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


@term
class ExtraClassNLL(Term):
    """Negative log-likelihood of the further class on the forget rows, ``-log softmax(z_1 ... z_K, z_new)_new``.

    For rows: the features are those of the row itself.
    """

    name: ClassVar[str] = "extra-class-nll"
    uses: ClassVar[frozenset[str]] = frozenset({"extra-class"})

    layer: int = Field(-1, ge=-512, lt=512, description="layer that makes the scores, of whose input the new one is made too")

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Scores and what they are made of, of the current model."""
        value = f"features:{layers[block_index(self.layer, layers)]}"
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits"), (Stream.FORGET, Of.CURRENT, value)})

    def values(self, views: Views) -> Tensor:
        """One value per row, ``[N]``."""
        view = views.current(Stream.FORGET)
        features = view.features(views.layers[block_index(self.layer, views.layers)])[view.token_supervised]
        extra = views.made["extra-class"](features).to(view.logits.dtype)
        return -F.log_softmax(torch.cat([view.logits, extra], dim=1), dim=1)[:, -1]
