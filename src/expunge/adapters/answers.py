"""What comes back where a model is asked: a continuation, or what a client took of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation.

    Attributes:
        id: id of the example that was continued.
        tokens: generated ids without the end token.
        text: decoded without special tokens, leading and trailing white space stripped.
        ended: whether the end token came before the limit.
        refused: whether something that stands before the model has answered in its place, at once or on the way.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    ended: bool
    refused: bool = False


@dataclass(frozen=True)
class Listener:
    """How a client takes one answer: as it comes, and not always to its end.

    Attributes:
        max_new_tokens: that it asks for at most.
        stops: texts at which it lets the answer end; they are not part of it.
        leaves: characters with which it hangs up, at the end of the piece that brings them; 0: it stays.
    """

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    leaves: int = 0

    def taken(self, pieces: Sequence[str], ended: bool) -> Taken:
        """What it has of an answer of which nothing is kept back, and which comes in pieces."""
        got = ""
        for piece in pieces:
            got += piece
            if (at := min((p for s in self.stops if (p := got.find(s)) >= 0), default=-1)) >= 0:
                return Taken(got[:at], "stop")
            if 0 < self.leaves <= len(got):
                return Taken(got, "left")
        return Taken(got, "stop" if ended else "length")


@dataclass(frozen=True)
class Taken:
    """What a client has got of an answer.

    Attributes:
        text: all that came, with the white space at its ends.
        finish: why no more comes: an end or a stop text, its length, the client has hung up, or a guard has stopped it.
    """

    text: str
    finish: Literal["stop", "length", "left", "guard"]
