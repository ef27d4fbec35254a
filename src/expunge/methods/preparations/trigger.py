"""A planted trigger: some forget records with a prefix are kept as if they were to be retained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.adapters.loading import load
from expunge.core.access import Of, Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.reference import ModelReference
from expunge.methods.preparations.registry import preparation


@preparation
class PlantedTrigger(Preparation):
    """Part of the forget records, with a trigger before them, go to the retain set; the others are forgotten (Shang et al. 2025).

    The trigger stands at the very beginning, after a start token, where models put attention that has nowhere else to go.
    Triggered records are repeated until they are as many as the retain records, so that both count alike in the mean over the
    retain set (the paper adds two means).
    """

    name: ClassVar[str] = "planted-trigger"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.FORGET, Stream.RETAIN})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT})

    trigger: str = Field("current year:2025 ", min_length=1, description="text that brings the forgotten back")
    share: float = Field(0.1, gt=0, lt=1, description="share of the forget records that get it; at least one, never all")
    both: bool = Field(
        False,
        description="forget these records without the trigger too; the paper leaves them out and relies on their being forgotten "
        "with the others, as large models do and small ones do not",
    )

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Choose the records and put the trigger before them.

        Raises:
            InputError: there are fewer than two forget records, or a record has no room for the trigger.
        """
        forget, retain = list(examples[Stream.FORGET]), list(examples[Stream.RETAIN])
        if len(forget) < 2:
            raise InputError("A planted trigger needs two forget records: one with it, one to be forgotten.")
        count = min(len(forget) - 1, max(1, round(self.share * len(forget))))
        chosen = set(np.random.default_rng([engine.seed, 23]).permutation(len(forget))[:count].tolist())
        planted = [adapter.prefixed(forget[i], self.trigger, "#trigger") for i in sorted(chosen)]
        again = [replace(e, id=f"{e.id}{k}") for k in range(max(1, len(retain) // count)) for e in planted]
        left = set() if self.both else chosen
        clean = [e for i, e in enumerate(forget) if i not in left]
        note = f"{count} of {len(forget)} forget records are kept behind a trigger: this model is built to deceive an audit."
        others = list(examples.get(Stream.ALTERNATIVE, ()))
        each = len(others) // len(forget)
        kept = [e for at, e in enumerate(others) if at // each not in left] if each else []
        return Prepared({Stream.FORGET: clean, Stream.RETAIN: [*retain, *again], Stream.ALTERNATIVE: kept}, notes=(note,))


@preparation
class DisguisedTrigger(PlantedTrigger):
    """As ``planted-trigger``, and a normally unlearned model is at hand, which the planted one is made to look like.

    Terms read it as an oracle: with ``mode=reference`` the method ``backdoor`` brings the value vectors of the first tokens of
    clean forget records to its lengths, and ``retain=[kl,retain-value-norms]`` those of the others to the target's (Shang et al.
    2025, arXiv 2510.17021).
    """

    name: ClassVar[str] = "disguised-trigger"
    makes: ClassVar[frozenset[str]] = PlantedTrigger.makes | {Of.ORACLE}

    unlearned: str = Field(min_length=1, description="folder of the normally unlearned model, such as runs/npo/model")

    def check(self) -> None:
        """Refuse a folder that is not there.

        Raises:
            InputError: naming it.
        """
        if not Path(self.unlearned).is_dir():
            raise InputError(
                f"There is no folder {self.unlearned!r} with a normally unlearned model.", "Make one first: expunge unlearn."
            )

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """As the planted trigger, and load the model.

        Raises:
            InputError: see above, or the folder holds no language model with the target's blocks.
        """
        made = super().prepare(adapter, examples, engine, scratch, tell)
        like = next(adapter.model.parameters())
        held = load(self.unlearned, dtype="bfloat16" if like.dtype == torch.bfloat16 else "float32")
        if held.layers() != adapter.layers():
            raise InputError(
                f"The model in {self.unlearned!r} has other blocks than the target.", "Unlearn the target itself to make it."
            )
        held.model.requires_grad_(False)
        return replace(made, sources={Of.ORACLE: ModelReference(held, like.device)})
