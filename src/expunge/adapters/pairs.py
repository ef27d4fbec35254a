"""Encoder-decoder language models (T5, BART): the prompt goes to the encoder, the answer to the decoder.

All that a causal model does with the tokens of its answers this one does with those of its decoder. The decoder's sequence is
its start token, followed by the answer: the start token stands where a causal model has its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.adapters import generation, storage
from expunge.adapters.answers import Generation
from expunge.adapters.base import Batch, Example
from expunge.adapters.head import bare, base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import Runner, evaluating
from expunge.adapters.registry import adapter
from expunge.adapters.tokenise import Encoder, Tokens, single_turn
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.data.records import Record

DEFAULT_TEMPLATE = "{prompt} {answer}"


@dataclass(frozen=True, slots=True)
class Pair(Tokens):
    """What the adapter keeps of a record.

    Attributes:
        ids: the decoder's sequence: its start token, then the targets; int32.
        start: 1.
        ends: whether the last target is an end token.
        prompt: what the encoder reads, int32.
    """

    prompt: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))


class PairEncoder(Encoder):
    """Turns a record into what the encoder reads and what the decoder shall write, each as the tokenizer itself would have it.

    The part of a template before the answer goes to the encoder, the answer and what follows it to the decoder. Special tokens
    of both are the tokenizer's own; an end token is added to an answer that it leaves without one.

    Args:
        tokenizer: a transformers tokenizer.
        template: text with ``{prompt}`` and, after it, ``{answer}``; none: the prompt as it is.
        max_length: longest prompt and longest answer in tokens; none: no limit.
        truncate: cut what is longer instead of refusing it.
        begin: token with which the decoder starts.
    """

    def __init__(self, tokenizer: Any, template: str | None, max_length: int | None, truncate: bool, begin: int) -> None:
        super().__init__(tokenizer, template or DEFAULT_TEMPLATE, max_length, truncate)
        self.begin = begin

    def encode(self, record: Record, answer: str | None = None, prompt: str | None = None) -> Pair:
        """The tokens of a record, with another answer or prompt where given.

        Raises:
            InputError: no prompt, too long, nothing to supervise, no end token, or a chat of several turns.
        """
        answer = record.answer if answer is None else answer
        if record.is_text and prompt is None:
            raise InputError(
                f"Record {record.id!r} is plain text, and an encoder-decoder has no prompt to read before it.",
                "Cut it into prompt and completion.",
            )
        head, tail = self._sides(record, answer, prompt)
        before = self._fit(record, "prompt", list(self.tokenizer(head, verbose=False)["input_ids"]))
        after = list(self.tokenizer(text_target=tail, verbose=False)["input_ids"])
        if not self.tokenizer.decode(after, skip_special_tokens=True).strip():
            raise InputError(
                f"Record {record.id!r} has no token to supervise: {answer[:40]!r} becomes nothing.", "Give an answer."
            )
        after, _ = self._end(after)
        kept = self._fit(record, "answer", after)
        ids = np.asarray([self.begin, *kept], dtype=np.int32)
        return Pair(ids, 1, len(kept) == len(after), prompt=np.asarray(before, dtype=np.int32))

    def end_ids(self) -> list[int]:
        """The tokenizer's end token."""
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def _sides(self, record: Record, answer: str, prompt: str | None) -> tuple[str, str]:
        text = single_turn(record) if prompt is None else prompt
        if record.verbatim and not record.messages:
            return text, answer.lstrip(" ")
        before, rest = self.template.split("{prompt}")
        between, after = rest.split("{answer}")
        return (before + text + between).rstrip(" "), answer + after

    def _fit(self, record: Record, side: str, ids: list[int]) -> list[int]:
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if self.truncate:
            return ids[: self.max_length]
        raise InputError(
            f"The {side} of record {record.id!r} has {len(ids)} tokens; the model's context holds {self.max_length}.",
            "Split or shorten it, or have it cut: text.truncate=true (in Python truncate=True).",
        )


class PairRunner(Runner):
    """Forward passes whose columns are those of the decoder; the encoder reads the prompts beside them."""

    def _inputs(self, batch: Batch, width: int) -> dict[str, Tensor]:
        return {
            "input_ids": batch.tensors["encoder_ids"],
            "attention_mask": batch.tensors["encoder_mask"],
            "decoder_input_ids": batch.tensors["input_ids"][:, :width],
            "decoder_attention_mask": batch.tensors["attention_mask"][:, :width],
        }

    def _probe(self, ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}

    def _fuses(self, model: nn.Module) -> bool:
        # BART adds a vector to the scores after its head, which nothing shows as long as it is 0.
        return not hasattr(base(model), "final_logits_bias") and super()._fuses(model)


@adapter
class PairAdapter(LanguageAdapter):
    """An encoder-decoder language model and its tokenizer; everything else is as in a causal model.

    Features are those after the blocks of the *decoder*, at its start token and at every token of the answer; of the encoder
    none can be asked for. An example's ``size`` counts the decoder's tokens, its ``cost`` those of the prompt too. Records of
    plain text have no prompt to be read by the encoder, and are refused.

    Args:
        model: a transformers encoder-decoder with a language-modelling head, or a peft model around one.
        tokenizer: its tokenizer.
        template: text with ``{prompt}`` and ``{answer}``: what comes before the answer goes to the encoder; none: the prompt.
        max_length: longest prompt and longest answer in tokens; none: what the model has positions for.
        truncate, dropout, fused, packed: see :class:`~expunge.adapters.language.LanguageAdapter`; batches are never packed.

    Raises:
        InputError: no encoder-decoder, one without a start token, a bad template, or a tokenizer with more tokens than the model.
    """

    modality: ClassVar[str] = "encoder-decoder"
    offers: ClassVar[frozenset[Offer]] = LanguageAdapter.offers - {
        Offer.SEQUENCE, Offer.ASSISTANT, Offer.EACH, Offer.VALUES, Offer.RECEIVED,
    }  # fmt: skip

    def _check(self, model: Any, tokenizer: Any) -> None:
        storage.check_model(model, tokenizer, pairs=True)
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            raise InputError(
                f"The configuration of {type(model).__name__} names no token with which the decoder starts.",
                "Set model.config.decoder_start_token_id.",
            )
        self.begin = int(start)

    def _limit(self, model: Any) -> int | None:
        # Relative positions (T5) know no longest sequence, whatever length the model was trained at.
        found = getattr(base(model).config, "max_position_embeddings", None)
        return int(found) if found else None

    def _coder(self, tokenizer: Any, template: str | None, limit: int | None, truncate: bool) -> Encoder:
        return PairEncoder(tokenizer, template, limit, truncate, self.begin)

    def _passes(self, *, fused: bool, packed: bool) -> Runner:
        return PairRunner(fused=fused, packed=False)

    def encode(self, record: Record, *, answer: str | None = None, suffix: str = "", prompt: str | None = None) -> Example:
        """Turn a record into token ids; see :class:`PairEncoder`.

        Raises:
            InputError: no prompt, too long, nothing to supervise, no end token, or a chat of several turns.
        """
        made: Any = self._encoder.encode(record, answer, prompt)
        size = len(made.ids)
        return Example(record.id + suffix, record.cluster, size - 1, size, made, cost=size + len(made.prompt))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded batch: as of a causal model for the decoder's tokens, and ``encoder_ids``, ``encoder_mask`` ``[B, S]``."""
        batch = super().collate(examples)
        prompts = [e.data.prompt for e in examples]
        sizes = np.array([len(p) for p in prompts])
        real = np.arange(sizes.max()) < sizes[:, None]
        ids = np.full(real.shape, self.pad_id(), dtype=np.int64)
        ids[real] = np.concatenate(prompts)
        encoder = {"encoder_ids": torch.from_numpy(ids), "encoder_mask": torch.from_numpy(real.astype(np.int64))}
        return Batch(
            batch.ids, {**batch.tensors, **encoder}, batch.targets, batch.owner, batch.position, batch.counts,
            batch.token_owner, batch.token_supervised, batch.token_counts,
        )  # fmt: skip

    def _continued(self, model: nn.Module, examples: Sequence[Example], limit: int, **drawing: Any) -> list[Generation]:
        limit = limit if self.context is None else min(limit, self.context)
        with torch.no_grad(), evaluating(model):
            tokens = generation.greedy_pairs(
                base(model), bare(model), [e.data.prompt for e in examples],
                limit=limit, ends=self.end_ids, pad=self.pad_id(), start=self.begin, **drawing,
            )  # fmt: skip
        return self._generations(examples, tokens)

    def layers(self) -> list[str]:
        """Names of the decoder's blocks, from the input to the output."""
        return storage.decoder_blocks(base(self.model))
