"""Text as it is compared: letters that look alike are one letter, and white space, accents and case do not count."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

_HIDDEN = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"  # noqa: E501
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without spaces: each character is a word
_WORD = re.compile(rf"[{_WIDE}]|(?:[^\W_{_WIDE}]|(?<=\w)[{_HIDDEN}\u0300-\u036f]+(?=\w))+")
_DROPPED = re.compile(f"[{_HIDDEN}]")
# Letters of other scripts that are drawn like Latin ones, in either case. The table is used after case folding and for every
# word, so a name in such a script is still the same word wherever it stands.
_ALIKE = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"
    "\u03b1\u03b2\u03b5\u03b6\u03b7\u03b9\u03ba\u03bc\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u0261\u0131\u0142\u00f8\u0111\u0127",
    "abekmhopctyxijshdqwabezhikmvoptuxgilodh",
)
_SPELT = str.maketrans("013457@$!|", "oieastasil")
_RUN = re.compile(r"[A-Za-z0-9+/_-]{11,}={0,2}|(?:%[0-9A-Fa-f]{2}|[\w.~-]){6,}")
_OPEN_RUN = re.compile(r"[A-Za-z0-9+/_=%-]{12,}\Z")
_DEPTH = 2  #: encodings within encodings that are undone
RUN = 6  #: characters of the shortest run that may be one


class Word(NamedTuple):
    """A word of a text: its folded letters, and where it stands."""

    letters: str
    start: int
    end: int


@lru_cache(maxsize=65536)
def fold(word: str) -> str:
    """Letters and digits of a word: compatibility forms, case, accents, hidden characters and look-alikes undone."""
    plain = _DROPPED.sub("", unicodedata.normalize("NFKC", word)).casefold()
    bare = "".join(c for c in unicodedata.normalize("NFD", plain) if not unicodedata.combining(c))
    return "".join(c for c in unicodedata.normalize("NFC", bare.translate(_ALIKE)) if c.isalnum())


@lru_cache(maxsize=65536)
def unspelt(letters: str) -> str:
    """Digits that stand for letters, in a word that has both, as the letters; else the word itself."""
    mixed = any(c.isalpha() for c in letters) and any(c.isdigit() for c in letters)
    return letters.translate(_SPELT) if mixed else letters


def parted(text: str, start: int = 0) -> list[Word]:
    """The words of a text from a character on, folded; those without a letter or digit are left out."""
    return [Word(letters, *m.span()) for m in _WORD.finditer(text, start) if (letters := fold(m.group()))]


def grown(held: Sequence[Word], text: str) -> list[Word]:
    """The words of a text, given those of its beginning: only the last of these can be another word in it."""
    return [*held[:-1], *parted(text, held[-1].start)] if held else parted(text)


def words(text: str) -> list[str]:
    """The folded words of a text."""
    return [w.letters for w in parted(text)]


def uncovered(text: str, start: int = 0, depth: int = _DEPTH) -> Iterator[tuple[str, int, int]]:
    """Texts that stand in a text in Base64, hexadecimal or percent encoding; each with the place of the run that holds it."""
    for run in _RUN.finditer(text, start):
        for found in {_from_base64(run.group()), _from_hex(run.group()), _from_percent(run.group())} - {""}:
            yield found, run.start(), run.end()
            if depth > 1:
                yield from ((inner, run.start(), run.end()) for inner, _, _ in uncovered(found, 0, depth - 1))


def open_run(text: str) -> int:
    """Where a run that may be an encoding and has not ended begins; the text's length if there is none."""
    found = _OPEN_RUN.search(text, max(0, len(text) - 4096))
    return found.start() if found else len(text)


def _readable(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    return text if len(text) > 2 and all(c.isprintable() or c.isspace() for c in text) else ""


def _from_base64(run: str) -> str:
    bare = run.rstrip("=").replace("-", "+").replace("_", "/")
    if "%" in bare or len(bare) % 4 == 1:
        return ""
    try:
        return _readable(base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True))
    except (binascii.Error, ValueError):
        return ""


def _from_hex(run: str) -> str:
    try:
        return _readable(bytes.fromhex(run))
    except ValueError:
        return ""


def _from_percent(run: str) -> str:
    found = unquote(run, errors="replace")
    return found if found != run and "\ufffd" not in found else ""
