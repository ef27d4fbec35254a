"""A small word-level tokenizer, trained on the texts at hand: what small models of the demo and the tests speak."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from expunge.adapters.extra import need
from expunge.core.errors import InputError

_PIECE = r" ?\w+| ?[^\w\s]|\s"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer(texts: Iterable[str], *, size: int | None = None) -> Any:
    """A tokenizer whose tokens are words (with the space before them) and punctuation marks.

    Words it has not seen are spelt in single characters, so every text over the characters of ``texts`` survives encoding
    and decoding unchanged. A begin token is put before each text; ``pad``, ``bos``, ``eos`` and ``unk`` have ids 0 to 3.

    Args:
        texts: what it must be able to write; templates count too.
        size: largest vocabulary; the rarest words are left out. None: all words.

    Returns:
        A ``PreTrainedTokenizerFast``, saved and loaded like any other.

    Raises:
        MissingExtra: tokenizers or transformers are not installed.
        InputError: there is no text, or ``size`` has no room for the characters.
    """
    tokenizers = need("tokenizers", "A tokenizer")
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    counts: Counter[str] = Counter()
    characters: set[str] = set()
    for text in texts:
        counts.update(re.findall(_PIECE, text))
        characters.update(text)
    if not counts:
        raise InputError("A tokenizer needs at least one text that is not empty.")
    base = [*SPECIAL, *sorted(characters | {" "})]
    if size is not None and size < len(base):
        raise InputError(f"A vocabulary of {size} has no room for {len(base)} characters and special tokens.")
    known = set(base)
    words = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if w not in known]
    vocabulary = base + words[: None if size is None else size - len(base)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    longest = max(map(len, vocabulary))
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(ids, unk_token=SPECIAL[3], continuing_subword_prefix="", max_input_chars_per_word=max(100, longest))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_PIECE), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", pair=f"{SPECIAL[1]} $A $B", special_tokens=[(SPECIAL[1], ids[SPECIAL[1]])]
    )
    return need("transformers", "A tokenizer").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        clean_up_tokenization_spaces=False,
    )
