"""A target with low-rank updates beside it, each loaded for an input as far as a detector finds it near to a request."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.adapters.composite import Composite, Open
from expunge.adapters.detector import Detector, Weighing
from expunge.adapters.extra import need, quiet
from expunge.adapters.lowrank import LowRank, loaded
from expunge.adapters.reading import HiddenStates, TextEncoder, open_encoder, prompt_mask
from expunge.adapters.storage import forward_parameters
from expunge.core.errors import InputError

_WORSE = "Restore the folder from a copy, or make it again."


class GatedRequest(nn.Module):
    """What one request put beside the target.

    Args:
        update: the low-rank update that it learnt.
        detector: says how near an input is to its texts.
        weighing: how far the update is loaded then.
        strength: by which all its weights are multiplied.
        continued: the update took over from that of the request before, which is no longer loaded itself.
        reading: the update of the encoder that its detector reads with; none: it reads the target's own states.
    """

    def __init__(
        self,
        update: LowRank,
        detector: Detector,
        weighing: Weighing,
        *,
        strength: float = 1.0,
        continued: bool = False,
        reading: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.update, self.detector, self.reading = update, detector, reading
        self.weighing, self.strength, self.continued = weighing, strength, continued

    def described(self) -> dict[str, Any]:
        """All that no tensor tells."""
        reading = None if self.reading is None else dict(zip(self.reading.names, self.reading.scales, strict=True))
        return {
            "update": dict(zip(self.update.names, self.update.scales, strict=True)), "detector": self.detector.described(),
            "weighing": self.weighing.model_dump(mode="json"), "strength": self.strength, "continued": self.continued,
            "reading": reading,
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write its tensors."""
        folder.mkdir()
        save_file(self.update.tensors(), folder / "adapter.safetensors")
        save_file(self.detector.tensors(), folder / "detector.safetensors")
        if self.reading is not None:
            save_file(self.reading.tensors(), folder / "reading.safetensors")

    @classmethod
    def load(cls, folder: Path, held: dict[str, Any]) -> GatedRequest:
        """Undo :meth:`described` and :meth:`save`.

        Raises:
            InputError: something is missing or damaged.
        """
        try:
            reading = None
            if held["reading"] is not None:
                reading = LowRank.restored(load_file(folder / "reading.safetensors"), held["reading"])
            return cls(
                LowRank.restored(load_file(folder / "adapter.safetensors"), held["update"]),
                Detector(load_file(folder / "detector.safetensors"), **held["detector"]), Weighing(**held["weighing"]),
                strength=float(held["strength"]), continued=bool(held["continued"]), reading=reading,
            )  # fmt: skip
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(f"The request in {str(folder)!r} is missing or damaged.", _WORSE) from error


class Gated(Composite):
    """A target that stays as it is, and what requests put beside it: updates, and detectors that say when they are loaded.

    For each sequence every detector reads the prompt (where a forward pass does not say how long it is: the whole sequence),
    and the weights that follow hold for the whole sequence, in generation too, where they are computed once. Each adapted module
    of the target then returns ``base(x) + sum_s w_s strength_s scale_s B_s A_s x``. An update that a later request continued is
    loaded no more; the later one is loaded with the largest weight of all requests that it carries. A sequence whose
    weights are all 0 gets what the target says.

    Args:
        target: a transformers model with a language-modelling head.
        requests: in the order in which they came.
        encoder: read by those detectors that do not read the target's own states.
        tokenizer: the target's, which turns prompts into texts for the encoder.
        keep_target: see :class:`~expunge.adapters.composite.Composite`.

    Raises:
        InputError: a request does not fit the target, or reads an encoder that is not there.
    """

    kind: ClassVar[str] = "gated"

    def __init__(
        self,
        target: Any,
        requests: Sequence[GatedRequest],
        *,
        encoder: TextEncoder | None = None,
        tokenizer: Any = None,
        keep_target: bool = True,
    ) -> None:
        super().__init__(target, keep_target=keep_target)
        for number, request in enumerate(requests):
            self._check(request, encoder, tokenizer)
            # Not in a list of modules: where such a list is as long as the target is deep, it looks like its blocks.
            self.add_module(f"request{number + 1}", request)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.count = len(requests)
        self.reader = HiddenStates(target)
        self.describe()

    def _check(self, request: GatedRequest, encoder: TextEncoder | None, tokenizer: Any) -> None:
        modules = dict(self.target.named_modules())
        for name, a, b, _ in request.update.pairs():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or sorted(weight.shape) != sorted((b.shape[0], a.shape[1])):
                raise InputError(
                    f"The adapter is for a module {name!r} of {a.shape[1]} inputs and {b.shape[0]} outputs; the target has none.",
                    "Use the target that it was trained on.",
                )
        if request.detector.encoder and (encoder is None or tokenizer is None or request.reading is None):
            raise InputError("A detector reads an encoder, and the model has none.", _WORSE)

    @property
    def requests(self) -> list[GatedRequest]:
        """In the order in which they came."""
        return [getattr(self, f"request{n + 1}") for n in range(self.count)]

    def described(self) -> dict[str, Any]:
        """Of each request all that is no tensor."""
        return {"requests": [r.described() for r in self.requests], "encoder": self.encoder is not None}

    def get_output_embeddings(self) -> nn.Module:
        """The target's head."""
        found: nn.Module = self.target.get_output_embeddings()
        return found

    # ---- what is loaded

    @torch.no_grad()
    def closeness(self, ids: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """How usual each prompt is for each request, in [0, 1], ``[requests, B]``.

        Args:
            ids: tokens ``[B, T]``.
            mask: 1 for real tokens; none: all are.
            lengths: tokens of each prompt; none: all are the prompt's.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        prompt = prompt_mask(mask, lengths)
        texts: list[str] | None = None
        own: dict[tuple[tuple[int, ...], str], Tensor] = {}  # detectors that read the same states share a pass
        found = []
        for request in self.requests:
            detector = request.detector
            key = (detector.layers, detector.pool)
            if detector.encoder and self.encoder is not None and request.reading is not None:
                texts = texts or self.texts(ids, prompt)
                features = self.encoder.features(texts, request.reading, *key)
            else:
                if key not in own:
                    own[key] = self.reader.features(ids, mask, prompt, *key)
                features = own[key]
            found.append(detector.closeness(features))
        return torch.stack(found)

    def weights(self, ids: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """With which weight each request's update is loaded, ``[requests, B]``; arguments as of :meth:`closeness`."""
        requests = self.requests
        found = self.closeness(ids, mask, lengths)
        each = [r.weighing.weights(c) for r, c in zip(requests, found, strict=True)]
        for number in range(1, len(each)):
            if requests[number].continued:
                each[number] = torch.maximum(each[number], each[number - 1])
                each[number - 1] = torch.zeros_like(each[number])
        return torch.stack([w * r.strength for w, r in zip(each, requests, strict=True)])

    def texts(self, ids: Tensor, prompt: Tensor) -> list[str]:
        """The prompts as texts, without special tokens."""
        rows = [row[real].tolist() for row, real in zip(ids.cpu(), prompt.cpu(), strict=True)]
        return [prompt_text(self.tokenizer, row) for row in rows]

    def _loaded(self, weights: Tensor) -> Any:
        return loaded(self.target, [(r.update, w) for r, w in zip(self.requests, weights, strict=True)])

    # ---- as a model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """What the target says with the updates loaded; ``prompt_lengths`` ``[B]`` are tokens, none: all are the prompt's."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        accepted = forward_parameters(self.target)
        with self._loaded(self.weights(input_ids, attention_mask, prompt_lengths)):
            return self.target(**{k: v for k, v in given.items() if k in accepted and v is not None})

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The target's ``generate``, with weights from the prompts that hold to the end; options as there."""
        settings = copy.deepcopy(options.pop("generation_config", None) or self.generation_config)
        rest = settings.update(**options)
        with self._loaded(self.weights(input_ids, attention_mask)):
            return self.target.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **rest)

    def save_parts(self, folder: Path) -> None:
        """A folder for each request, and the encoder."""
        for number, request in enumerate(self.requests):
            request.save(folder / f"request-{number + 1}")
        if self.encoder is not None:
            self.encoder.save(folder / "encoder")


def prompt_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that an encoder reads of a prompt's ids."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def load_parts(folder: Path, held: dict[str, Any], target: Any, open_model: Open) -> Gated:
    """The kind's own part of :func:`expunge.adapters.composite.load`.

    Raises:
        InputError: a part is missing or damaged, or does not fit the target.
    """
    if not isinstance(held.get("requests"), list) or not held["requests"]:
        raise InputError(f"The composite in {str(folder)!r} is damaged.", _WORSE)
    encoder = tokenizer = None
    if held.get("encoder"):
        encoder = open_encoder(folder / "encoder")
        with quiet():
            tokenizer = need("transformers", "A language model").AutoTokenizer.from_pretrained(str(folder))
    requests = [GatedRequest.load(folder / f"request-{n + 1}", said) for n, said in enumerate(held["requests"])]
    for request in requests:
        request.update.to(target.dtype)
    return Gated(target, requests, encoder=encoder, tokenizer=tokenizer)
