"""Errors meant for the person who runs Expunge.

Every message is one clear sentence that names the owner of the problem, what was found, what is allowed, and the remedy.
The command line prints the text without a traceback and exits with :attr:`ExpungeError.exit_code`:

==== =====================================================================================
code meaning
==== =====================================================================================
0    done, and the goal that was asked for is reached
1    an error nobody foresaw (with a traceback: please report it), or the machine failed on the way (a disk filled: one sentence)
2    bad input or environment: nothing was started, nothing was written
3    finished, but the goal was not reached (forgetting incomplete, or the utility bound hit)
4    stopped to protect the model (loss or weights became NaN/Inf): the last good state is kept
130  interrupted by the user: `--resume` goes on
141  what read the output went away (a closed pipe)
==== =====================================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExpungeError(Exception):
    """Base of all errors that carry a message for the user.

    Args:
        message: one sentence that says what is wrong.
        remedy: one sentence or command that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message} {remedy}".strip())


class InputError(ExpungeError):
    """The input or the environment does not allow the work to start; raised before any of it has."""

    exit_code = 2


class MissingExtra(InputError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs packages that are not installed.", f"Install them: pip install 'expunge[{extra}]'")


class NoRoom(InputError):
    """There is too little memory for it now; with other work ended, or on another machine, it may fit."""


class OwnCodeError(InputError):
    """A function of the user's own raised an error.

    Args:
        message: which function, and what it raised.
        trace: its traceback, from its own first line on: that is what helps to correct it.
    """

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message, "Correct it; the lines above say where it happened.")
        self.trace = trace


class Destroyed(ExpungeError):
    """Training was stopped because going on would destroy the model; the last good state was kept."""

    exit_code = 4


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that look most like ``name``, best first; a known name that contains it counts as near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.6)
    folded = name.lower().replace("-", "").replace("_", "")
    close += [k for k in known if k not in close and folded and folded in k.lower().replace("-", "").replace("_", "")]
    return close[:n]


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not one of ``known``: names the nearest ones, or all if there are few."""
    known = sorted(set(known))
    close = nearest(name, known)
    if close:
        hint = "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    elif len(known) <= 12:
        hint = "Known: " + ", ".join(known) + "." if known else f"There are no {kind}s here."
    else:
        hint = f"There are {len(known)} to choose from, such as " + ", ".join(known[:8]) + "."
    return InputError(f"There is no {kind} {name!r}.", hint)
