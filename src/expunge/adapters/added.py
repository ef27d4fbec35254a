"""A language model that reads texts as one token each which it did not have before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from expunge.adapters.extra import quiet
from expunge.adapters.head import base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.storage import mark_unsaved


def with_tokens(adapter: LanguageAdapter, texts: Sequence[str], seed: int = 0) -> LanguageAdapter:
    """A copy of a model whose tokenizer reads texts as special tokens; those that it has already stay as they are.

    Rows of new tokens are drawn from the normal distribution of the rows that are there, as transformers has it. No file holds
    the model then, so what is trained on top of it is saved with its weights.

    Args:
        adapter: the model; it is left as it is.
        texts: of the tokens.
        seed: of the new rows.
    """
    tokenizer = copy.deepcopy(adapter.tokenizer)
    known = set(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in texts if t not in known]})
    model = copy.deepcopy(adapter.model)
    inner = base(model)
    if len(tokenizer) > inner.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with quiet():
                inner.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
        mark_unsaved(inner)
    truncate = adapter._encoder.truncate
    return LanguageAdapter(model, tokenizer, template=adapter.template, max_length=adapter.context, truncate=truncate)
