"""Poison for a class: its rows that show the concepts which carry it, with another class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.concepts import ConceptBank, carrying, class_similarity, concept_weights, learn_concepts
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.parameters import block_index
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.alternatives import other_class
from expunge.methods.preparations.registry import preparation

Classes = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]


@preparation
class ConceptPoison(Preparation):
    """Poison: the forget rows that show a concept which carries their class, each with another class (Chang et al. 2024).

    Each concept is a linear detector on the features of one block, learnt from labelled rows; an interpretable linear layer from
    the concept scores to the classes says which concepts carry a class (:mod:`expunge.engine.concepts`). A row shows a concept
    where its score is above 0. Forget rows that show none of them are left out of training. The paper gives no setting of the
    poisoning step; how a similar class is chosen is ours: the nearest mean of concept scores.

    The file is a NumPy archive (``.npz``) with ``ids``, ids of forget or retain rows as text ``[n]``, ``concepts``, 1 where the
    row shows the concept and 0 where it does not, ``[n, K]``, and ``names`` of the concepts ``[K]``.
    """

    name: ClassVar[str] = "concept-poison"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.FORGET, Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.FEATURES, Offer.CLASSES, Offer.ROWS})

    file: str = Field("", description="NumPy archive with ids, concepts and names; it must be given unless rows=all")
    rows: Literal["concepts", "random", "all"] = Field(
        "concepts",
        description="forget rows that show the concepts, as many drawn at random (to see what the concepts add), or all",
    )
    label: Literal["random", "similar", "dissimilar"] = Field(
        "random", description="another class for each row, or for all rows of a class the one most or least alike in its concepts"
    )
    top: int = Field(3, ge=1, description="concepts that carry a class, at most")
    layer: int = Field(-1, ge=-512, lt=512, description="block whose features are read, counted from 0, negative from the end")
    samples: int = Field(100, ge=1, description="rows that show a concept, and rows that do not, for its detector, at most")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Learn the concepts, choose the rows, relabel them.

        Raises:
            InputError: the file does not fit the rows, no concept carries a class, or no row of the class shows one.
        """
        forget = list(examples[Stream.FORGET])
        everything = [*forget, *examples[Stream.RETAIN]]
        features, classes = self._read(adapter, everything, engine.max_tokens)
        own = classes[: len(forget)]
        chosen, notes = np.ones(len(forget), dtype=bool), []
        labels = [other_class(e.id, c, adapter.n_classes or 0, engine.seed) for e, c in zip(forget, own.tolist(), strict=True)]
        if self.rows != "all" or self.label != "random":
            bank = self._bank(features, [e.id for e in everything], engine.seed)
            scores = bank.scores(features)
            if self.rows != "all":
                weights = concept_weights(scores, classes, adapter.n_classes or 0, seed=engine.seed)
                for c in np.unique(own).tolist():
                    chosen[own == c] = self._carriers(bank, weights, scores[: len(forget)][own == c], c, engine.seed)
                    notes.append(f"Class {c} is carried by {', '.join(bank.names[k] for k in carrying(weights, c, self.top))}.")
            if self.label != "random":
                labels = self._alike(scores, classes, own, adapter.n_classes or 0)
        kept = [i for i in range(len(forget)) if chosen[i]]
        made = [adapter.replace(forget[i], answer=labels[i], suffix="#poison") for i in kept]
        notes.append(f"{len(kept)} of {len(forget)} forget rows became poison.")
        return Prepared(examples={Stream.FORGET: [forget[i] for i in kept], Stream.ALTERNATIVE: made}, notes=tuple(notes))

    def _read(self, adapter: Adapter, examples: Sequence[Example], units: int) -> tuple[Scores, Classes]:
        """Features ``[n, D]`` and classes ``[n]``, in order."""
        layers = adapter.layers()
        value = f"features:{layers[block_index(self.layer, layers)]}"
        device = next(adapter.model.parameters()).device
        found: dict[str, tuple[Scores, int]] = {}
        with torch.no_grad():
            for part in fitting(examples, units):
                batch = adapter.collate(part).to(device)
                states = adapter.forward(adapter.model, batch, frozenset({value})).values[value].double().cpu().numpy()
                found |= {i: (row, int(c)) for i, row, c in zip(batch.ids, states, batch.targets.tolist(), strict=True)}
        pairs = [found[e.id] for e in examples]
        return np.stack([row for row, _ in pairs]), np.array([c for _, c in pairs], dtype=np.int64)

    def _bank(self, features: Scores, ids: Sequence[str], seed: int) -> ConceptBank:
        """The detectors, from the rows that the file labels."""
        if not self.file:
            raise InputError(
                "Nothing says which rows show which concepts.", "Give preparation.file: an archive with ids, concepts and names."
            )
        try:
            with np.load(self.file, allow_pickle=False) as data:
                labelled, shown, names = data["ids"].astype(str), data["concepts"], tuple(data["names"].astype(str).tolist())
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"The file {self.file!r} holds no concepts: {error}.", "Write ids, concepts and names with numpy.savez."
            ) from None
        if labelled.ndim != 1 or shown.shape != (len(labelled), len(names)) or not np.isin(shown, (0, 1)).all():
            raise InputError(
                f"The concepts have ids {list(labelled.shape)}, labels {list(shown.shape)} and {len(names)} names.",
                "Give 0 or 1 for each row and concept: ids [n], concepts [n, K], names [K].",
            )
        where = {name: i for i, name in enumerate(ids)}
        missing = [i for i in labelled.tolist() if i not in where]
        if missing:
            raise InputError(
                f"The concepts label {len(missing)} rows that there are not, such as {missing[0]!r}.",
                "Use ids of forget and retain rows.",
            )
        rows = features[[where[i] for i in labelled.tolist()]]
        return learn_concepts(rows, shown.astype(bool), names, samples=self.samples, seed=seed)

    def _carriers(self, bank: ConceptBank, weights: Scores, scores: Scores, c: int, seed: int) -> npt.NDArray[np.bool_]:
        """Which rows of class ``c``, with concept scores ``[n, K]``, are chosen."""
        top = carrying(weights, c, self.top)
        if not top:
            raise InputError(f"No concept speaks for class {c} more than for the others.", "Label a concept that does.")
        shown: npt.NDArray[np.bool_] = np.any(scores[:, top] > 0, axis=1)
        if not shown.any():
            raise InputError(
                f"No forget row of class {c} shows {' or '.join(bank.names[k] for k in top)}, which carry it.",
                "Use preparation.rows=all.",
            )
        if self.rows == "random":
            drawn = np.random.default_rng([seed, 42, c]).permutation(len(scores))[: int(shown.sum())]
            return np.isin(np.arange(len(scores)), drawn)
        return shown

    def _alike(self, scores: Scores, classes: Classes, own: Classes, n_classes: int) -> list[int]:
        """For each forget row the class that is most, or least, like its own in concepts."""
        alike = class_similarity(scores, classes, n_classes)
        np.fill_diagonal(alike, np.nan)
        pick = np.nanargmax if self.label == "similar" else np.nanargmin
        target = {c: int(pick(alike[c])) for c in np.unique(own).tolist()}
        return [target[c] for c in own.tolist()]
