"""One more class than there are."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import nn

from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.engine.options import Engine
from expunge.engine.parameters import block_index
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class ExtraClass(Preparation):
    """A further row of the last layer, with fresh weights: the score of a class that does not exist (Chen et al. 2023).

    It is trained with the model and dropped at the end, so the classes stay as they were.
    """

    name: ClassVar[str] = "extra-class"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({"extra-class"})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.FEATURES, Offer.ROWS, Offer.CLASSES})

    layer: int = Field(-1, ge=-512, lt=512, description="layer that makes the scores, of whose input the new one is made too")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Make the row.

        Raises:
            InputError: the model has no such layer.
        """
        layers = adapter.layers()
        block = layers[block_index(self.layer, layers)]
        like = next(adapter.model.parameters())
        batch = adapter.collate(examples[Stream.FORGET][:1]).to(like.device)
        size = adapter.forward(adapter.model, batch, frozenset({f"features:{block}"})).features(block).shape[1]
        row = nn.Linear(size, 1).to(like.device, like.dtype)
        return Prepared(made={"extra-class": row}, grown={"extra-class": row})
