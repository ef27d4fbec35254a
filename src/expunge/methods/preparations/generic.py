"""Generic labels for a text: what a model would say that had not read it (Who's Harry Potter)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.adapters.combination import Combination
from expunge.adapters.translate import Translation
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.engine.gradients import fitting
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.preparations.registry import preparation
from expunge.methods.terms.generic import DROPPED, MADE
from expunge.methods.terms.likelihood import NLL

_UNITS = 1024  #: input tokens per forward pass of three models whose scores are held together


@preparation
class GenericLabels(Preparation):
    """A label for each forget token: the likeliest one in ``v - alpha relu(v_reinforced - v)`` (Eldan and Russinovich 2023).

    ``v_reinforced`` are the scores of a copy that was trained further on the forget text, and is dropped afterwards; ``v``
    those of the target. Where a dictionary of anchors is given, ``v`` is read in the text with all anchored terms replaced by
    their generic counterparts, so a name cannot lead to what belongs to it. A token and its counterpart are those with the same
    text before them; the second and further tokens of a term have none, and for them ``v`` is read in the original text.

    The dictionary is a JSON object of term and counterpart, ``{"Hogwarts": "Mystic Academy"}``; the paper had a language model
    write 1,500 of them. A term is found as a whole word with the case that it is written in. Where it occurs again in the
    same example, its tokens are left out of the loss, or get the labels of the first mention: both keep the model from
    being taught to call one thing by two names. What label the term itself gets at its first mention the paper leaves to
    the formula; ``mentions=counterpart`` gives it the counterpart's tokens instead, as many as it has itself.

    The copy is trained on through ``checkpoint``, so a run that was killed goes on with it.
    """

    name: ClassVar[str] = "generic-labels"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({MADE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.SEQUENCE, Offer.TEXT})

    anchors: str = Field("", description="JSON file: term to generic counterpart; none: nothing is replaced")
    alpha: float = Field(5.0, ge=0, description="how far scores that rose under reinforcement are pushed down")
    mentions: Literal["formula", "counterpart"] = Field(
        "formula", description="label of an anchored term where it first occurs: by the formula, or its counterpart"
    )
    repeated: Literal["drop", "first"] = Field(
        "drop", description="label of a term that occurred before: none, or that of its first mention"
    )
    epochs: float = Field(10.0, gt=0, description="passes over the forget set that reinforce the copy (paper: 3)")
    lr: float | None = Field(None, gt=0, description="their learning rate; none: found by a range test (paper: 3e-6)")
    batch: int = Field(128, ge=1, description="forget examples per step (paper: 8 in 16 portions)")

    def check(self) -> None:
        """Read the dictionary.

        Raises:
            InputError: the file holds none.
        """
        if self.anchors:
            read_anchors(self.anchors)

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Reinforce a copy, compare, choose the labels; or read those that are in ``scratch``.

        Raises:
            InputError: the file holds no dictionary, or a text becomes longer than the context by it.
        """
        terms = read_anchors(self.anchors) if self.anchors else {}
        forget = list(examples[Stream.FORGET])
        path = scratch / "generic-labels.safetensors"
        if path.is_file():
            held = load_file(path)
            made = _Made(dict(zip([e.id for e in forget], torch.split(held["labels"], held["counts"].tolist()), strict=True)))
            made.found = dict(zip(terms, held["found"].tolist(), strict=True))
        else:
            strong = self._reinforced(adapter, forget, engine, scratch / "reinforced", tell)
            made = self._labels((adapter, strong), forget, terms, min(engine.max_tokens, _UNITS), tell)
            self._keep(path, made, forget)
            shutil.rmtree(scratch / "reinforced", ignore_errors=True)
        return Prepared(made={MADE: made.labels}, notes=self._notes(adapter, forget, made))

    def _reinforced(
        self, adapter: Adapter, forget: Sequence[Example], engine: Engine, folder: Path, tell: Tell | None
    ) -> Adapter:
        """A copy of the target that has been trained further on the forget set."""
        strong = adapter.copy()
        schedule = Fixed(lr=self.lr, epochs=self.epochs, batch=self.batch, warmup=0, decay="constant", weight_decay=0)

        def progress(done: int, total: int, text: str) -> None:
            if tell is not None:
                tell(done, total, f"reinforcing a copy: {text}")

        folder.mkdir(parents=True, exist_ok=True)
        own = engine.model_copy(update={"trackers": ()})
        recipe = compose("reinforce", retain=[NLL()], schedule=schedule)
        train(strong, recipe, {Stream.RETAIN: forget}, own, folder=folder, resume=True, progress=progress)
        strong.model.eval().requires_grad_(False)
        return strong

    @torch.no_grad()
    def _labels(
        self,
        models: tuple[Adapter, Adapter],
        forget: Sequence[Example],
        terms: Mapping[str, str],
        units: int,
        tell: Tell | None,
    ) -> _Made:
        """Labels of all targets, from the target and the reinforced copy."""
        adapter, strong = models
        formula = Combination(weight=-self.alpha, link="relu", against="target", centred=False)
        made = _Made({}, dict.fromkeys(terms, 0))
        device = next(adapter.model.parameters()).device
        translated = dict(zip([e.id for e in forget], adapter.translate(forget, terms), strict=True)) if terms else {}

        def scores(held: Adapter, chosen: Sequence[Example]) -> dict[str, Tensor]:
            out = held.forward(held.model, held.collate(chosen).to(device), frozenset({"logits"}))
            return dict(zip(out.batch_ids, torch.split(out.logits, list(out.counts)), strict=True))

        for chosen in fitting(forget, units):
            plain, reinforced = scores(adapter, chosen), scores(strong, chosen)
            generic = scores(adapter, [translated[e.id][0] for e in chosen]) if terms else {}
            for example in chosen:
                v = plain[example.id]
                if terms:
                    new, told = translated[example.id]
                    v = _aligned(v, generic[new.id], example.data.start, told)
                labels = formula.scores(v, reinforced[example.id]).argmax(-1).cpu()
                if terms:
                    self._mention(labels, example.data.start, translated[example.id][1], made.found)
                made.labels[example.id] = labels
            if tell is not None:
                tell(len(made.labels), len(forget), "choosing generic labels")
        return made

    def _mention(self, labels: Tensor, start: int, told: Translation, found: dict[str, int]) -> None:
        """Give the tokens of anchored terms their labels, in place."""
        first: dict[str, Tensor] = {}
        for mention in told.mentions:
            found[mention.term] += 1
            here = labels[max(0, mention.start - start) : max(0, mention.stop - start)]
            if mention.term in first:
                earlier = first[mention.term]
                here[:] = DROPPED
                if self.repeated == "first":
                    here[: len(earlier)] = earlier[: len(here)]
                continue
            if self.mentions == "counterpart":
                own = torch.tensor(mention.counterpart[: len(here)], dtype=labels.dtype)
                here[:] = DROPPED
                here[: len(own)] = own
            first[mention.term] = here.clone()

    def _keep(self, path: Path, made: _Made, forget: Sequence[Example]) -> None:
        """Labels in the order of the examples, flat, their counts, and how often each term was found."""
        held = [made.labels[e.id] for e in forget]
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = torch.tensor([len(x) for x in held])
        with atomic_path(path) as temporary:
            found = torch.tensor(list(made.found.values()), dtype=torch.int64)
            save_file({"labels": torch.cat(held), "counts": counts, "found": found}, temporary)

    def _notes(self, adapter: Adapter, forget: Sequence[Example], made: _Made) -> tuple[str, ...]:
        true = torch.cat([adapter.collate([e]).targets for e in forget])
        labels = torch.cat([made.labels[e.id] for e in forget])
        dropped = labels == DROPPED
        said = f"{int((labels != true)[~dropped].sum())} of {len(labels)} forget tokens get another label"
        notes = [said + (f", {int(dropped.sum())} are left out." if bool(dropped.any()) else ".")]
        if not self.anchors:
            notes.append("No dictionary of anchors was given (preparation.anchors=FILE): it is empty.")
        elif sum(made.found.values()) == 0:
            notes.append(f"None of the {len(made.found)} anchored terms occurs in the forget set.")
        else:
            used = sum(n > 0 for n in made.found.values())
            notes.append(f"{used} of {len(made.found)} anchored terms occur in the forget set, {sum(made.found.values())} times.")
        return tuple(notes)


@dataclass
class _Made:
    """Labels by example, and how often each term was found."""

    labels: dict[str, Tensor]
    found: dict[str, int] = field(default_factory=dict)


def _aligned(plain: Tensor, generic: Tensor, start: int, told: Translation) -> Tensor:
    """Scores for each target ``[N, V]``: in the translated text where it has a counterpart, else as they are."""
    place = torch.from_numpy(told.place[start:]).to(plain.device)
    row = place - told.tokens.start
    return torch.where((place >= 0)[:, None], generic[row.clamp(min=0)], plain)


def read_anchors(file: str) -> dict[str, str]:
    """Terms and counterparts from a JSON file.

    Raises:
        InputError: it cannot be read, or holds something else, or an empty text.
    """
    try:
        held: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The anchors {file!r} cannot be read: {error}.", 'Write {"term": "counterpart", ...}.') from None
    if not isinstance(held, dict) or not held:
        raise InputError(f"The anchors {file!r} are no JSON object of texts.", 'Write {"term": "counterpart", ...}.')
    for term, counterpart in held.items():
        if not isinstance(counterpart, str) or not term.strip() or not counterpart.strip():
            raise InputError(f"The anchor {term!r} has the counterpart {counterpart!r}.", "Give a text for each term.")
    return {term.strip(): counterpart.strip() for term, counterpart in held.items()}
