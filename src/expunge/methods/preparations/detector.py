"""A detector that tells the prompts of a forget set from everything else, without data of anything else (O3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.adapters.detector import LEAST, Detector, Signs, fit_detector
from expunge.adapters.gated import Gated, prompt_text
from expunge.adapters.loading import check_weights, locate
from expunge.adapters.lowrank import LowRank
from expunge.adapters.reading import HiddenStates, TextEncoder, open_encoder, prompt_mask
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.encoder import EncoderTraining, train_encoder
from expunge.methods.preparations.registry import preparation

_LOOKED = 256  #: retain prompts that are looked at, at most


@dataclass(frozen=True)
class MadeDetector:
    """What the preparation hands to a finish.

    Attributes:
        detector: fitted.
        encoder: that it reads; none: it reads the target's own hidden states.
        reading: the request's update of that encoder.
        tokenizer: the target's, which turns prompts into texts.
    """

    detector: Detector
    encoder: TextEncoder | None = None
    reading: LowRank | None = None
    tokenizer: Any = None


@preparation
class OODDetector(Preparation):
    """An out-of-distribution detector of the forget prompts (Gao et al. 2024, arXiv 2407.10223).

    It scores features of a prompt at several layers by Mahalanobis distance and by the largest cosine to a forget prompt, joins
    the layers by a linear one-class SVM, and says by a mixture of two normal distributions how usual the result is for the
    forget set; see :mod:`expunge.adapters.detector`. The features are token means of a masked language model that is tuned on
    the forget prompts (``encoder``, as published: roberta-large), or, without one, of the target's own hidden states, where
    nothing is tuned.

    A share of the forget prompts is held out: on them the second part of the mixture and its width are fitted. The published
    code takes *test* prompts for that, and chooses its checkpoint by other test data; both leak, and neither is offered. The
    covariance is shrunk (Ledoit and Wolf 2004), since there are often fewer prompts than dimensions; the published code inverts
    the plain one. Of a sequence without a prompt (plain text) the whole text is read.

    All layers are read by default, so none is chosen. ``layers=chosen`` takes the one that tells held-out forget prompts best
    from retain prompts, which then must be given. Wherever retain prompts are given they are counted for a note: how well
    they are told apart, and how many of them are left to the target. Otherwise they change nothing.
    """

    name: ClassVar[str] = "ood-detector"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({"detector"})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.SEQUENCE, Offer.ASSISTANT})

    encoder: str = Field("", description="folder or hub id of a masked language model; none: the target's own hidden states")
    layers: tuple[int, ...] | Literal["all", "chosen"] = Field(
        "all", description="blocks that are read, from 0, negative from the end; all; or the one that retain prompts choose"
    )
    pool: Literal["mean", "last"] = Field(
        "mean", description="mean of the features of all tokens of the prompt, or its last token's"
    )
    cosine: float | None = Field(
        None, ge=0, description="weight of the cosine; none: 1000 with an encoder, else such that both parts vary alike"
    )
    signs: Signs = Field("agree", description="official: the cosine works against the distance, as in the published code")
    nu: float = Field(0.1, gt=0, le=1, description="of the one-class SVM: share of the prompts that may lie outside")
    held_out: float = Field(
        0.25, gt=0, lt=0.7, description="share of the forget prompts that the mixture's second part is fitted on"
    )
    epochs: float = Field(2.0, gt=0, description="passes of the encoder over the forget prompts")
    lr: float = Field(1e-5, gt=0, description="its learning rate")
    batch: int = Field(8, ge=2, description="prompts per step")

    def check(self) -> None:
        """Refuse an encoder that is no model folder, or has pickled weights only.

        Raises:
            InputError: naming it.
        """
        if self.encoder:
            check_weights(Path(locate(self.encoder)))

    def examine(self, adapter: Adapter, examples: Examples) -> None:
        """Refuse too few prompts, and a choice of layers that nothing could make.

        Raises:
            InputError: saying which.
        """
        forget = _distinct(examples[Stream.FORGET])
        if len(forget) < LEAST:
            raise InputError(
                f"The detector needs {LEAST} forget prompts that differ, and there are {len(forget)}.",
                "Give more of the same kind (paraphrases count), or use a method without a detector.",
            )
        if self.layers == "chosen" and not examples.get(Stream.RETAIN):
            raise InputError(
                "layers=chosen chooses by retain prompts, and none were given.", "Give --retain DATA, or use layers=all."
            )
        if not self.encoder:
            _layers(self.layers, len(adapter.layers()))

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Tune the encoder if there is one, and fit.

        Raises:
            InputError: too few prompts, no such layer, an encoder that cannot be had or is another one than that of an earlier
                request, or no retain prompts by which a layer could be chosen.
        """
        self.examine(adapter, examples)
        language: Any = adapter
        fitted, held = self._split(examples[Stream.FORGET], engine.seed)
        retain = _some(examples.get(Stream.RETAIN, ()), engine.seed)
        encoder, reading = self._encoder(language.model), None
        depth = len(adapter.layers()) if encoder is None else len(encoder.layers)
        layers = _layers(self.layers, depth)
        parts = [fitted, held, retain] if retain else [fitted, held]
        if encoder is None:
            seen = [_own(language, part, layers, self.pool, engine.max_tokens) for part in parts]
        else:
            texts = [[prompt_text(language.tokenizer, _read(e)) for e in part] for part in parts]
            reading = self._tuned(encoder, texts[0], scratch / "detector.safetensors", tell)
            seen = [_read_by(encoder, said, reading, layers, self.pool) for said in texts]
        notes = [f"The detector is fitted on {len(fitted)} forget prompts, its mixture on {len(held)} more that were held out."]
        if self.layers == "chosen":
            layers, seen, chosen = self._choose(layers, seen, encoder is not None)
            notes.append(chosen)
        detector = self._fit(layers, seen, encoder is not None)
        notes += _told(detector, seen)
        return Prepared(made={"detector": MadeDetector(detector, encoder, reading, language.tokenizer)}, notes=tuple(notes))

    def _split(self, examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
        """Distinct forget prompts: those that it is fitted on, and those that are held out."""
        forget = _distinct(examples)
        order = np.random.default_rng([seed, 31]).permutation(len(forget))
        count = min(max(2, round(self.held_out * len(forget))), len(forget) - 4)
        return [forget[int(i)] for i in sorted(order[count:])], [forget[int(i)] for i in sorted(order[:count])]

    def _encoder(self, model: Any) -> TextEncoder | None:
        held: TextEncoder | None = model.encoder if isinstance(model, Gated) else None
        if not self.encoder:
            return None
        made = open_encoder(self.encoder).to(model.device)
        if held is None:
            return made
        from expunge.adapters.identity import describe_tokenizer, weights_hash

        if describe_tokenizer(held.tokenizer) != describe_tokenizer(made.tokenizer):
            raise InputError(
                f"The encoder {self.encoder!r} has another tokenizer than the one that an earlier request's detector reads.",
                "Give the same encoder for all requests.",
            )
        if weights_hash(held.model).hexdigest() != weights_hash(made.model).hexdigest():
            raise InputError(
                f"The encoder {self.encoder!r} has other weights than the one that an earlier request's detector reads.",
                "Give the same encoder for all requests.",
            )
        return held

    def _tuned(self, encoder: TextEncoder, texts: Sequence[str], path: Path, tell: Tell | None) -> LowRank:
        """The encoder's update, trained or read from ``path``."""
        if path.is_file():
            names = encoder.adapted()
            made = LowRank.restored(load_file(path), dict.fromkeys(names, EncoderTraining().scale))
        else:
            training = EncoderTraining(epochs=self.epochs, lr=self.lr, batch=self.batch)
            made = train_encoder(encoder, texts, training, tell)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(made.tensors(), temporary)
        return made.to(next(encoder.model.parameters()).device)

    def _fit(self, layers: Sequence[int], seen: Sequence[Tensor], encoder: bool) -> Detector:
        cosine = 1000.0 if self.cosine is None and encoder else self.cosine
        return fit_detector(
            seen[0], seen[1], layers=layers, pool=self.pool, encoder=encoder, cosine=cosine, signs=self.signs, nu=self.nu
        )

    def _choose(self, layers: Sequence[int], seen: Sequence[Tensor], encoder: bool) -> tuple[tuple[int, ...], list[Tensor], str]:
        """The layer whose own detector tells held-out forget prompts best from retain prompts; of equals the last."""
        best, found = -1.0, 0
        for at in range(len(layers)):
            one = [part[:, at : at + 1] for part in seen]
            area = _area(self._fit((layers[at],), one, encoder), one[1], one[2])
            if area >= best:
                best, found = area, at
        said = (
            f"The detector reads block {layers[found]}: of {len(layers)} it tells {len(seen[1])} held-out forget prompts best "
            f"from {len(seen[2])} retain prompts (area {best:.3f})."
        )
        return (layers[found],), [part[:, found : found + 1] for part in seen], said


def _told(detector: Detector, seen: Sequence[Tensor]) -> list[str]:
    """What a report must say of how well the detector tells apart what it was not fitted on."""
    near = detector.closeness(seen[1])
    missed = float((near < 0.05).float().mean())
    notes = [f"Of the held-out forget prompts it finds {missed:.0%} unusual (less than 0.05)."]
    if len(seen) > 2:
        far = float((detector.closeness(seen[2]) < 0.05).float().mean())
        area = _area(detector, *seen[1:])
        notes.append(
            f"It tells held-out forget prompts from {len(seen[2])} retain prompts with area {area:.3f} under the curve, "
            f"and finds {far:.0%} of these unusual (less than 0.05); the others are not left to the target alone."
        )
    return notes


def _area(detector: Detector, forget: Tensor, retain: Tensor) -> float:
    """How well closeness tells forget from other prompts: 1 perfect, 0.5 by chance."""
    from sklearn.metrics import roc_auc_score

    near = torch.cat([detector.closeness(forget), detector.closeness(retain)])
    return float(roc_auc_score([1] * len(forget) + [0] * len(retain), near.numpy()))


def _layers(wanted: tuple[int, ...] | str, depth: int) -> tuple[int, ...]:
    if isinstance(wanted, str):
        return tuple(range(depth))
    for layer in wanted:
        if not -depth <= layer < depth:
            raise InputError(
                f"Layer {layer} is out of range: the detector reads {depth} blocks.", f"Use -{depth} to {depth - 1}."
            )
    if not wanted:
        raise InputError("The detector needs a layer to read.", "Use preparation.layers=all.")
    return tuple(sorted({layer % depth for layer in wanted}))


def _read(example: Example) -> list[int]:
    """The ids that the detector reads: those of the prompt, or of the whole where there is none."""
    tokens = example.data
    found: list[int] = (tokens.ids if tokens.start <= 1 else tokens.ids[: tokens.start]).tolist()
    return found


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of each prompt."""
    return list({tuple(_read(e)): e for e in reversed(examples)}.values())[::-1]


def _some(examples: Sequence[Example], seed: int) -> list[Example]:
    order = np.random.default_rng([seed, 37]).permutation(len(examples))[:_LOOKED]
    return [examples[int(i)] for i in sorted(order)]


@torch.no_grad()
def _own(adapter: Any, examples: Sequence[Example], layers: Sequence[int], pool: str, units: int) -> Tensor:
    """Features of prompts in the target's own states, ``[n, L, D]`` in main memory, in the order of the examples."""
    reader = HiddenStates(adapter.model.target if isinstance(adapter.model, Gated) else adapter.model)
    device = next(reader.model.parameters()).device
    found: dict[str, Tensor] = {}
    for chosen in fitting(examples, units):
        batch = adapter.collate(chosen).to(device)
        lengths = torch.tensor([e.data.start for e in chosen], device=device)
        mask = batch.tensors["attention_mask"]
        states = reader.features(batch.tensors["input_ids"], mask, prompt_mask(mask, lengths), layers, pool).cpu()
        found |= {e.id: s for e, s in zip(chosen, states, strict=True)}
    return torch.stack([found[e.id] for e in examples])


def _read_by(encoder: TextEncoder, texts: Sequence[str], reading: LowRank, layers: Sequence[int], pool: str) -> Tensor:
    """Features of texts in an encoder with an update, ``[n, L, D]`` in main memory."""
    return torch.cat([encoder.features(texts[a : a + 32], reading, layers, pool).cpu() for a in range(0, len(texts), 32)])
