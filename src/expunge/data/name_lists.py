"""Which names exist: a list in a file, or a function of the user's. Nothing is ever asked over the network.

A list is kept sorted: a name is looked up by bisection, and so is whether any name begins with some characters. Memory is that of
the names and one pointer each; millions are fine.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, get_args

from expunge.core.entries import is_entry, load_function, own_code
from expunge.core.errors import InputError
from expunge.data.packages import IMPORTED_AS, Ecosystem, Mention, normalised


class Names(Protocol):
    """What is known of the names that exist."""

    def valid(self, mention: Mention) -> bool:
        """Whether the name exists."""

    def begins(self, text: str, ecosystem: str) -> bool:
        """Whether a name that exists begins with ``text`` (as far as is known)."""


class NameList:
    """Names by ecosystem.

    Args:
        names: as their registry writes them; ``ecosystem:name``, or a name alone, which then is one of every ecosystem.
        ecosystems: that are asked for; names of others are left out.
    """

    def __init__(self, names: Iterable[str], ecosystems: Sequence[str]) -> None:
        found: dict[str, set[str]] = {e: set() for e in ecosystems}
        for line in names:
            place, colon, rest = line.partition(":")
            own = bool(colon) and place in _ALL
            for ecosystem in [place] if own else found:
                if ecosystem in found:
                    found[ecosystem].add(normalised((rest if own else line).strip(), ecosystem))
        if "python" in found:
            modules = {normalised(m, "python") for m, p in IMPORTED_AS.items() if normalised(p, "python") in found["python"]}
            found["python"] |= modules
        self._names = {e: sorted(held) for e, held in found.items()}

    def __len__(self) -> int:
        return max(map(len, self._names.values()))

    def valid(self, mention: Mention) -> bool:
        """Whether the list has the name."""
        held, key = self._names.get(mention.ecosystem, []), mention.key
        at = bisect_left(held, key)
        return at < len(held) and held[at] == key

    def begins(self, text: str, ecosystem: str) -> bool:
        """Whether a name of the list begins with ``text``."""
        held, key = self._names.get(ecosystem, []), normalised(text, ecosystem)
        at = bisect_left(held, key)
        return at < len(held) and held[at].startswith(key)


_ALL = frozenset(get_args(Ecosystem))


def read_list(path: str | Path, ecosystems: Sequence[str]) -> NameList:
    """A list from a text file with one name a line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        InputError: it cannot be read, or holds no name.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = (line.strip() for line in file)
            found = NameList((line for line in lines if line and not line.startswith("#")), ecosystems)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The names in {str(path)!r} cannot be read: {error}.", "Give a UTF-8 text file with one name a line."
        ) from None
    if not len(found):
        raise InputError(f"The list {str(path)!r} holds no name.", "Write the names that exist into it, one a line.")
    return found


class AskedNames:
    """A function of the user's that says whether a name exists: ``function(name, ecosystem) -> bool``; each name is asked once.

    Args:
        source: ``package.module:function`` or ``file.py:function``. It is the user's own code, and runs as such.

    Raises:
        OwnCodeError: its module raises an error.
        InputError: no such function.
    """

    def __init__(self, source: str) -> None:
        if not is_entry(source):
            raise InputError(f"{source!r} names no function.", "Write package.module:function or file.py:function.")
        self.source = source
        self._function = load_function(source, "it gets a name and its ecosystem and returns whether the name exists")
        self._said: dict[tuple[str, str], bool] = {}
        self._valid: dict[str, list[str]] = {}

    def valid(self, mention: Mention) -> bool:
        """What the function says of the name as its registry writes it.

        Raises:
            OwnCodeError: it raises an error.
            InputError: it returns something else than true or false.
        """
        place = (mention.ecosystem, mention.key)
        if place not in self._said:
            with own_code(self.source):
                said = self._function(mention.key, mention.ecosystem)
            if not isinstance(said, bool):
                raise InputError(
                    f"{self.source!r} returned {said!r} for {mention.key!r}.", "Return True if it exists, else False."
                )
            self._said[place] = said
            if said:
                insort(self._valid.setdefault(mention.ecosystem, []), mention.key)
        return self._said[place]

    def begins(self, text: str, ecosystem: str) -> bool:
        """Whether a name that was asked for and exists begins with ``text``."""
        held, key = self._valid.get(ecosystem, []), normalised(text, ecosystem)
        at = bisect_left(held, key)
        return at < len(held) and held[at].startswith(key)
