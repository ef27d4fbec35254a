"""What commands print: tables and progress for people, one JSON object for machines."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:  # torch takes more than a second to import: only commands that compute may pay for it
    from expunge.engine.outcome import Progress as Callback


_SYSTEM = {
    errno.ENOSPC: ("The disk is full", "Free some room; the same command with --resume goes on where it stopped."),
    errno.EDQUOT: ("The disk quota is used up", "Free some room; the same command with --resume goes on where it stopped."),
    errno.EFBIG: ("A file grew past the limit of this system", "Raise it (ulimit -f); the same command with --resume goes on."),
    errno.EACCES: ("There is no permission", "Change the permission, or choose another folder."),
    errno.EROFS: ("The disk is read-only", "Choose another folder."),
}
"""What the operating system may refuse in the middle of the work, with what to do about it: no traceback helps there."""


def _number(error: Exception) -> int:
    """The operating system's number of an error; safetensors raises its own kind, with the number in the text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


class Output:
    """Writes to standard output (results) and standard error (progress, notes, errors).

    Args:
        machine: print one JSON object instead of text for people; notes and progress are left out.
    """

    def __init__(self, machine: bool = False) -> None:
        self.machine = machine
        self.console = Console(highlight=False)
        self.aside = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """A line beside the result."""
        if not self.machine:
            self.aside.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on standard error, for machines too: what would be dangerous to overlook."""
        self.aside.print(Text.assemble(("Warning: ", "bold yellow"), text), soft_wrap=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """The result for machines."""
        if self.machine:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    def say(self, renderable: Any) -> None:
        """The result for people: text or any rich renderable."""
        if not self.machine:
            text = isinstance(renderable, str)
            self.console.print(Text(renderable) if text else renderable, soft_wrap=text)

    def error(self, message: str, remedy: str = "") -> None:
        """An error for the user."""
        if self.machine:
            sys.stdout.write(json.dumps({"error": message, "remedy": remedy}, ensure_ascii=False) + "\n")
        self.aside.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
        if remedy:
            self.aside.print(Text(remedy), soft_wrap=True)

    def unforeseen(self, error: Exception, trace: str) -> int:
        """An error that nobody foresaw, or a wrong option or argument; returns the exit code."""
        usage = getattr(error, "format_message", None)  # typer brings its own copy of click, whose classes are not click's
        if usage is not None and usage().startswith("Usage:"):  # no argument at all
            sys.stderr.write(usage() + "\n")
            return 2
        if usage is not None:
            place = getattr(getattr(error, "ctx", None), "command_path", "expunge")
            self.error(usage().rstrip(".") + ".", f"See {place} --help.")
            return 2
        said = _SYSTEM.get(_number(error))
        if said is not None:
            name = getattr(error, "filename", None)
            self.error(f"{said[0]}: {name}." if name else f"{said[0]}.", said[1])
            return 1
        sys.stderr.write(trace)
        self.error(f"{type(error).__name__}: {error}", "Nobody foresaw this: please report it with the lines above.")
        return 1

    @contextmanager
    def progress(self, what: str) -> Iterator[Callback | None]:
        """A progress bar on standard error, as the callback that long work takes; none for machines."""
        if self.machine:
            yield None
            return
        columns = (
            SpinnerColumn(), TextColumn("{task.fields[what]}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}", style="dim"),
        )  # fmt: skip
        with Progress(*columns, console=self.aside, transient=True) as bar:
            task = bar.add_task("", total=None, what=what)

            def tell(done: int, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, description=text)

            yield tell
