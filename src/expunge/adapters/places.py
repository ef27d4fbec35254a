"""Where a name stands among the tokens of an example, and the same example with another name in its place."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.adapters.base import Example
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.tokenise import Tokens
from expunge.core.errors import InputError
from expunge.data.records import Record


@dataclass(frozen=True)
class Place:
    """A name in an example.

    Attributes:
        example: in which it stands.
        first, last: its first and its last token.
    """

    example: Example
    first: int
    last: int


def find_place(adapter: LanguageAdapter, example: Example, name: str) -> Place | None:
    """The first occurrence of a name, as whole words, among the tokens of an example; none if it does not occur.

    Tokens are found by decoding: the last one is that with which the text first holds the whole name, so a token that also
    holds what comes before or after (a space, a full stop) counts as part of it.
    """
    ids = [int(i) for i in example.data.ids]

    def text(stop: int) -> str:
        decoded: str = adapter.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        return decoded

    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text(len(ids)))
    if found is None or not name.strip():
        return None
    stops = range(len(ids) + 1)
    first = bisect_left(stops, found.start() + 1, key=lambda stop: len(text(stop))) - 1
    last = bisect_left(stops, found.end(), key=lambda stop: len(text(stop))) - 1
    return Place(example, first, last) if name in text(last + 1) else None


def upto(place: Place) -> Place:
    """The same example cut behind the name, which is all that the states at the name depend on; one token more is its target."""
    ids = list(place.example.data.ids[: place.last + 1])
    return Place(_made(place.example.id, place.example.cluster, ids), place.first, place.last)


def with_name(adapter: LanguageAdapter, place: Place, name: str, instead: str) -> Place:
    """The example up to the place of ``name``, with another name there."""
    ids = [int(i) for i in place.example.data.ids]
    spoken: str = adapter.tokenizer.decode(ids[place.first : place.last + 1], clean_up_tokenization_spaces=False)
    lead = spoken[: max(0, spoken.find(name))]
    own: list[int] = list(adapter.tokenizer(lead + instead, add_special_tokens=False, verbose=False)["input_ids"])
    made = ids[: place.first] + own
    return Place(_made(place.example.id + "#other", place.example.cluster, made), place.first, len(made) - 1)


def asked(adapter: LanguageAdapter, before: str, name: str) -> Place:
    """A name at the end of a prompt of its own, written as the model's prompts are (chat template or template).

    Raises:
        InputError: the name is not found again in what the template makes of it.
    """
    words = f"{before} {name}".strip()
    example = adapter.encode(Record(id=f"{words!r}", prompt=words, answer="Answer:"))
    place = find_place(adapter, example, name)
    if place is None:
        raise InputError(
            f"The name {name!r} does not survive the tokenizer or the template: it is not found in what they make of {words!r}.",
            "Write it as the model's texts do.",
        )
    return upto(place)


def _made(name: str, cluster: str, ids: list[Any]) -> Example:
    tokens = Tokens(np.asarray([*ids, ids[-1]], dtype=np.int32), len(ids), False)
    return Example(name, cluster, 1, len(tokens.ids), tokens)
