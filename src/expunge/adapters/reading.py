"""What a detector sees of a prompt: hidden states of a model's blocks, pooled over the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters import storage
from expunge.adapters.assistant import first_blocks
from expunge.adapters.extra import need, quiet
from expunge.adapters.lowrank import LowRank, loaded
from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError

ADAPTED = (
    "query",
    "key",
    "value",
    "q_lin",
    "k_lin",
    "v_lin",
    "q_proj",
    "k_proj",
    "v_proj",
)  #: of attention, as encoders name them


class _Enough(Exception):
    """Raised inside a forward pass once the last block that is read is done."""


class HiddenStates:
    """The blocks of a causal model, up to the last one that is read.

    They are a model of their own with the same weights, so nothing that stands on the other one (hooks, another head) is touched
    or run. What of them is no weight follows the model from device to device.

    Args:
        model: a transformers model, not wrapped.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._held: dict[tuple[torch.device, int], Any] = {}

    @torch.no_grad()
    def features(self, ids: Tensor, mask: Tensor, prompt: Tensor, layers: Sequence[int], pool: str) -> Tensor:
        """Features of the prompts in a batch, float32 ``[B, L, D]``.

        Args:
            ids: tokens ``[B, T]``, padded on either side.
            mask: 1 for real tokens.
            prompt: true for those of the prompt.
            layers: blocks, from 0, ascending.
            pool: ``last``: of the prompt's last token; ``mean``: of all its tokens.
        """
        width = int(prompt.any(0).nonzero().max()) + 1  # what comes after the prompts is not run
        ids, mask, prompt = ids[:, :width], mask[:, :width], prompt[:, :width]
        small = self._small(max(layers) + 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": False}
        accepted = storage.forward_parameters(small)
        states = _states(
            small, [storage.block_names(small)[i] for i in layers], {k: v for k, v in given.items() if k in accepted}
        )
        return _pooled(states, prompt, pool)

    def _small(self, count: int) -> Any:
        key = (next(self.model.parameters()).device, count)
        if key not in self._held:
            self._held = {key: first_blocks(self.model, count)}
        return self._held[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> HiddenStates:
        import copy

        return HiddenStates(copy.deepcopy(self.model, memo))


class TextEncoder(nn.Module):
    """A masked language model that reads texts, and the tokenizer that it reads them with.

    Args:
        model: a transformers masked language model.
        tokenizer: its own.
        name: where it was loaded from.

    Raises:
        InputError: the tokenizer has no mask or padding token, or more tokens than the model.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise InputError(
                f"The tokenizer of the encoder {name!r} has no {'mask' if tokenizer.mask_token_id is None else 'padding'} token.",
                "Give a masked language model with its own tokenizer, such as roberta-large.",
            )
        rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
        if largest >= rows:
            raise InputError(
                f"The tokenizer of the encoder {name!r} has token ids up to {largest}, but the encoder only {rows} embeddings.",
                "Save the encoder's own tokenizer beside it.",
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer
        context = storage.context_of(model) or 512
        # Positions of RoBERTa begin after its padding id.
        self.longest = min(512, context - (tokenizer.pad_token_id + 1 if "roberta" in type(model).__name__.lower() else 0))

    @property
    def layers(self) -> list[str]:
        """Names of its blocks."""
        return storage.block_names(self.model)

    def adapted(self) -> list[str]:
        """Names of the modules that a request adapts: query, key and value of attention.

        Raises:
            InputError: there are none of the known names.
        """
        found = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in ADAPTED]
        if not found:
            some = sorted({n.rpartition(".")[2] for n, m in self.model.named_modules() if isinstance(m, nn.Linear)})
            raise InputError(
                f"The encoder {self.name!r} has no query, key and value that could be adapted; it has {', '.join(some)}.",
                "Use a BERT, RoBERTa or DistilBERT.",
            )
        return found

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Ids and mask of texts, cut to what it holds, on its device."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt", return_token_type_ids=False
        )
        device = next(self.model.parameters()).device
        return {k: found[k].to(device) for k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def features(self, texts: Sequence[str], update: LowRank, layers: Sequence[int], pool: str) -> Tensor:
        """Features of texts with a request's update, float32 ``[B, L, D]``; padding counts for nothing."""
        given = self.tokens(texts)
        real = given["attention_mask"].bool()
        with loaded(self.model, [(update, torch.ones(len(real), device=real.device))]):
            states = _states(self.model, [self.layers[i] for i in layers], given)
        return _pooled(states, real, pool)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer."""
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def open_encoder(source: str | Path) -> TextEncoder:
    """A masked language model from a folder, or by its name on the hub, with its tokenizer.

    Raises:
        InputError: there is none, it is no masked language model, or it has pickled weights only.
    """
    from expunge.adapters.loading import check_weights, locate

    transformers = need("transformers", "A detector with an encoder")
    place = locate(str(source))
    check_weights(Path(place))
    try:
        with quiet():
            model, info = transformers.AutoModelForMaskedLM.from_pretrained(
                place, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"{str(source)!r} is no masked language model with a tokenizer: {first}.",
            "Give a folder or hub id of one, such as roberta-large, or leave the encoder out.",
        ) from error
    if info["missing_keys"]:
        raise InputError(
            f"The weights of {str(source)!r} lack {min(info['missing_keys'])!r}, which would be random.",
            "Give a masked language model with its head.",
        )
    return TextEncoder(model, tokenizer, str(source))


def _states(model: Any, names: Sequence[str], given: dict[str, Any]) -> list[Tensor]:
    """Outputs ``[B, T, D]`` of some blocks; nothing after the last of them is run."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        if len(found) == len(names):
            raise _Enough

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        stack.enter_context(suppress(_Enough))
        model(**given)
    return found


def _pooled(states: Sequence[Tensor], real: Tensor, pool: str) -> Tensor:
    if pool == "mean":
        counts = real.sum(-1, keepdim=True)
        return torch.stack([s.float().masked_fill(~real[..., None], 0).sum(1) / counts for s in states], 1)
    columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real, columns, -1).amax(-1)
    return torch.stack([s[torch.arange(len(s), device=s.device), last].float() for s in states], 1)


def prompt_mask(mask: Tensor, lengths: Tensor | None) -> Tensor:
    """Which tokens of a batch are those of the prompts, bool ``[B, T]``.

    Args:
        mask: 1 for real tokens, padded on either side.
        lengths: tokens of each prompt; none: all of them. A sequence without a prompt (1 or less) counts as a whole.
    """
    real = mask.bool()
    if lengths is None:
        return real
    long = lengths.to(mask.device)[:, None]
    return real & ((mask.cumsum(-1) <= long) | (long <= 1))
