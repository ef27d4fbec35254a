"""A network of the target's shape that has never seen the forget set and has learnt a little of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.core.access import Of, Stream
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.reference import IncompetentReference
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.registry import preparation
from expunge.methods.terms.likelihood import NLL


@preparation
class Proxy(Preparation):
    """The incompetent network learns the retain set for a few epochs before the terms read it (Tarun et al. 2023).

    With 0 epochs it is the network that has learnt nothing, as without this preparation. The longer it learns, the more the whole
    amounts to retraining; the shorter, the more its answers are random. The paper's 2 epochs (rate 0.01, batches of 256) are some
    hundred steps on its 12,000 rows, and far too few on 2,000. It is trained anew if a killed run goes on.
    """

    name: ClassVar[str] = "proxy"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.RETAIN,)
    makes: ClassVar[frozenset[str]] = frozenset({Of.INCOMPETENT})

    epochs: float = Field(10.0, ge=0, description="passes over the retain set")
    lr: float = Field(1e-3, gt=0, description="learning rate, constant, of Adam without decay")
    batch: int = Field(64, ge=1, description="retain examples per step")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Make and train it; batch normalisation follows its batches, as it must in a network that begins."""
        source = IncompetentReference(adapter, next(adapter.model.parameters()).device, engine.seed)
        model = source.adapter.model
        if self.epochs:
            model.requires_grad_(True)
            schedule = Fixed(
                lr=self.lr, epochs=self.epochs, batch=self.batch, warmup=0, decay="constant", weight_decay=0, clip=None
            )
            own = engine.model_copy(update={"batch_norm": "batch", "checkpoint_every": 0, "trackers": ()})
            recipe = compose("proxy", retain=[NLL()], schedule=schedule)

            def progress(done: int, total: int, text: str) -> None:
                if tell is not None:
                    tell(done, total, f"the proxy learns: {text}")

            train(source.adapter, recipe, {Stream.RETAIN: examples[Stream.RETAIN]}, own, progress=progress)
            model.eval().requires_grad_(False)
        return Prepared(sources={Of.INCOMPETENT: source})
