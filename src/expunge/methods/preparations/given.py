"""Outputs of a model that is not at hand, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.reference import TableReference
from expunge.methods.preparations.registry import preparation


@preparation
class GivenOutputs(Preparation):
    """Scores of a model trained without the forget set, or predictions of them, from a file: the oracle that terms read.

    The file is a NumPy archive (``.npz``) with ``ids``, the ids of the examples as text ``[targets]``, and ``logits``, the scores
    of their targets ``[targets, V]``; an example with several targets has as many rows, in order.
    """

    name: ClassVar[str] = "given-outputs"
    reads: ClassVar[tuple[Stream, ...]] = ()
    makes: ClassVar[frozenset[str]] = frozenset({Of.ORACLE})

    file: str = Field(description="NumPy archive with ids and logits")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Read the file.

        Raises:
            InputError: it is no such archive, or holds values that are not finite.
        """
        try:
            with np.load(self.file, allow_pickle=False) as data:
                ids, logits = data["ids"].astype(str), data["logits"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"The file {self.file!r} holds no given outputs: {error}.", "Write ids and logits with numpy.savez."
            ) from None
        if ids.ndim != 1 or logits.ndim != 2 or len(ids) != len(logits) or not np.isfinite(logits).all():
            raise InputError(
                f"The given outputs have ids {list(ids.shape)} and logits {list(logits.shape)}.",
                "Give one row of finite scores for each target: ids [targets], logits [targets, V].",
            )
        rows: dict[str, list[int]] = {}
        for at, name in enumerate(ids.tolist()):
            rows.setdefault(name, []).append(at)
        scores = torch.from_numpy(logits.astype(np.float32))
        table = {name: scores[at] for name, at in rows.items()}
        return Prepared(sources={Of.ORACLE: TableReference(table, f"The outputs of {self.file!r}")})
