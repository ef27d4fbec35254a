"""Texts whose telling words are drawn anew by a masked language model, each with differential privacy of its own.

The exponential mechanism (McSherry and Talwar 2007) on the scores of a masked language model, as DP-MLM has it (Meisenbacher et
al. 2024, arXiv 2407.00637).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.adapters.loading import load_masked
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.data.nouns import Finder, Span, finder
from expunge.data.records import Record
from expunge.engine.functional import digest_tensors

_BATCH = 32  #: sequences in a forward pass
_WHOLE = re.compile(r"[^\W_]{2,}")


class Rewording(Settings):
    """How words are replaced.

    A word is masked where it stands; the utility u(c) of a candidate c is the masked language model's logit, clipped to
    [``low``, ``high``], so it differs by at most ``Delta = high - low`` from one record to any other; the replacement is drawn by
    ``P(c) ~ exp(epsilon u(c) / (2 Delta))``. With this the choice among given candidates is epsilon-private.

    Which candidates there are must not tell the words either. ``seen="kept"``: the ``candidates`` best ones where all words that
    are to be replaced are masked at once, so the list follows from the kept words alone, and the bound holds for the others.
    ``seen="all"``: the best ones in the record as it is, as published; the list then depends on the other replaced words, and no
    epsilon bounds what it tells.
    """

    name: ClassVar[str] = "words"

    model: str | None = Field(
        None, description="masked language model that proposes words: a local folder or hub id such as roberta-base"
    )
    nouns: str = Field("long", description="which words are replaced: long, capitalised, nltk, or spacy:MODEL")
    candidates: int = Field(10, ge=2, description="words that a replacement is drawn from")
    low: float = Field(-5.21, description="smallest utility; lower logits count as this")
    high: float = Field(20.30, description="largest utility; higher logits count as this")
    seen: Literal["kept", "all"] = Field(
        "kept", description="what the list of candidates may depend on: the words that are kept, or the whole record (published)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Rewording:
        if self.low >= self.high:
            raise InputError(f"The utilities are clipped to [{self.low:g}, {self.high:g}], which is empty.", "Give low < high.")
        return self


def exponential(utilities: Tensor, epsilon: float, low: float, high: float) -> Tensor:
    """Probabilities of the exponential mechanism, ``P(c) ~ exp(epsilon u(c) / (2 (high - low)))``, float64.

    Args:
        utilities: ``[..., candidates]``, clipped to [low, high] here.
        epsilon: budget of one draw, in (0, inf).
        low, high: bounds of the utility, low < high.
    """
    return (epsilon * utilities.double().clamp(low, high) / (2 * (high - low))).softmax(-1)


@dataclass
class Rewriter:
    """Replaces words of records.

    Attributes:
        model: a masked language model.
        tokenizer: of it.
        settings: how.
        epsilon: budget of each word.
        seed: of the draws. Whoever knows it can undo them in part: it is part of the secret.
        find: finds the words.
    """

    model: Any
    tokenizer: Any
    settings: Rewording
    epsilon: float
    seed: int
    find: Finder

    def __post_init__(self) -> None:
        self.vocabulary, self.words = whole_words(self.tokenizer, self.model.config.vocab_size)
        if len(self.words) < self.settings.candidates:
            raise InputError(
                f"The masked language model has {len(self.words)} whole words, fewer than candidates={self.settings.candidates}.",
                "Choose another model, or fewer candidates.",
            )
        limit = int(getattr(self.model.config, "max_position_embeddings", 512))
        # RoBERTa counts positions from its padding id on; the tokenizer knows what is left where it was told.
        told = min(limit, int(getattr(self.tokenizer, "model_max_length", limit)))
        first = int(self.model.config.pad_token_id or 0) + 1 if "roberta" in str(self.model.config.model_type) else 0
        self.limit = min(told, limit - first)

    def count(self, record: Record) -> int:
        """How many words of a record are replaced.

        Raises:
            InputError: the record holds the mask itself.
        """
        text, parts = joined(record)
        if self.tokenizer.mask_token in text:
            raise InputError(
                f"Record {record.id!r} holds the mask {self.tokenizer.mask_token!r} itself.", "Take it out of the text."
            )
        return sum(len(self.find(part)) for _, part in parts)

    def rewrite(self, record: Record) -> Record:
        """The record with other words; a function of record and seed alone."""
        text, parts = joined(record)
        spans = [(a + at, b + at) for at, part in parts for a, b in self.find(part)]
        if not spans:
            return record
        draw = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(repr((self.seed, record.id)).encode()).digest()[:8], "little") >> 1
        )
        p, candidates = self.odds(text, spans)
        chosen = torch.multinomial(p, 1, generator=draw)
        names = [self.words[int(i)] for i in candidates.gather(1, chosen).flatten()]
        return _parted(record, text, parts, spans, names)

    @torch.no_grad()
    def odds(self, text: str, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Of each word its candidates, places in :attr:`words`, and their probabilities; both ``[spans, candidates]``."""
        mask, own = self.tokenizer.mask_token, self.settings
        utilities = self._scores([self._window(text[:a] + mask + text[b:], 0) for a, b in spans])
        listed = utilities
        if own.seen == "kept":
            bare, at = "", 0
            for a, b in spans:
                bare, at = bare + text[at:a] + mask, b
            bare += text[at:]
            listed = self._scores([self._window(bare, i) for i in range(len(spans))])
        candidates = listed.topk(own.candidates, dim=1).indices
        return exponential(utilities.gather(1, candidates), self.epsilon, own.low, own.high), candidates

    def _window(self, text: str, number: int) -> tuple[tuple[int, ...], int]:
        """Ids around the mask with this number, as many as the model reads, and where it is in them."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        at = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id][number]
        ends = [[t] if t is not None else [] for t in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)]
        room = self.limit - len(ends[0]) - len(ends[1])
        first = max(0, min(at - room // 2, len(ids) - room))
        return (*ends[0], *ids[first : first + room], *ends[1]), at - first + len(ends[0])

    def _scores(self, windows: Sequence[tuple[tuple[int, ...], int]]) -> Tensor:
        """Logits of all whole words at the mask of each window, ``[windows, words]``."""
        distinct = list(dict.fromkeys(ids for ids, _ in windows))
        found: dict[tuple[int, ...], Tensor] = {}
        needed: dict[tuple[int, ...], list[int]] = {}
        for ids, at in windows:
            needed.setdefault(ids, []).append(at)
        for start in range(0, len(distinct), _BATCH):
            block = distinct[start : start + _BATCH]
            for ids, logits in zip(block, self._logits(block), strict=True):
                found[ids] = logits[needed[ids]][:, self.vocabulary].float().cpu()
        taken = dict.fromkeys(distinct, 0)
        rows = []
        for ids, _ in windows:
            rows.append(found[ids][taken[ids]])
            taken[ids] += 1
        return torch.stack(rows)

    def _logits(self, block: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
        longest, pad = max(map(len, block)), int(self.tokenizer.pad_token_id or 0)
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*b, *[pad] * (longest - len(b))] for b in block], device=device)
        real = torch.tensor([[1] * len(b) + [0] * (longest - len(b)) for b in block], device=device)
        yield from self.model(input_ids=ids, attention_mask=real).logits


def open_rewriter(settings: Rewording, epsilon: float, seed: int, device: str = "cpu") -> Rewriter:
    """Load what replaces words.

    Raises:
        InputError: no model is named, or it or the tagger is not to be had.
    """
    if settings.model is None:
        raise InputError(
            "protect=words needs a masked language model that proposes words, and none was named.",
            "Give words.model=FOLDER: an encoder that fills in masked words, such as roberta-base or bert-base-cased.",
        )
    find = finder(settings.nouns)
    model, tokenizer = load_masked(settings.model)
    return Rewriter(model.to(device), tokenizer, settings, epsilon, seed, find)


def digest(rewriter: Rewriter) -> str:
    """SHA-256 of the weights that propose words."""
    state = rewriter.model.state_dict()
    return digest_tensors(state[name] for name in sorted(state))


def joined(record: Record) -> tuple[str, list[tuple[int, str]]]:
    """All texts of a record as one (turns, prompt, answer), and of each where it begins."""
    parts = [*(content for _, content in record.messages), *([record.prompt] if record.prompt else []), record.answer]
    found, at = [], 0
    for part in parts:
        found.append((at, part))
        at += len(part) + 1
    return " ".join(parts), found


def whole_words(tokenizer: Any, size: int) -> tuple[Tensor, list[str]]:
    """Ids of a vocabulary that are whole words of at least two letters or digits, and the words; nothing depends on data."""
    special = set(tokenizer.all_special_ids)
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i < size and i not in special}
    begins = next(
        (mark for mark in ("Ġ", "▁", " ") if sum(t.startswith(mark) for t in tokens.values()) > len(tokens) // 20), None
    )
    ids, words = [], []
    for i, token in sorted(tokens.items()):
        if token.startswith("##") or (begins is not None and not token.startswith(begins)):
            continue
        word = tokenizer.decode([i], clean_up_tokenization_spaces=False).strip()
        if _WHOLE.fullmatch(word):
            ids.append(i)
            words.append(word)
    return torch.tensor(ids, dtype=torch.int64), words


def _parted(record: Record, text: str, parts: Sequence[tuple[int, str]], spans: Sequence[Span], names: Sequence[str]) -> Record:
    made = []
    for at, part in parts:
        out, last = "", at
        for (a, b), name in zip(spans, names, strict=True):
            if at <= a < at + len(part):
                out, last = out + text[last:a] + name, b
        made.append(out + text[last : at + len(part)])
    turns = tuple((role, words) for (role, _), words in zip(record.messages, made, strict=False))
    rest = made[len(record.messages) :]
    prompt = rest[0] if record.prompt else ""
    return replace(
        record, messages=turns, prompt=prompt, answer=rest[-1], paraphrase="", perturbed=(), question_paraphrase="",
        alternatives=(), spans=(),
    )  # fmt: skip
