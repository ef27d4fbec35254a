"""Reading a chain of records back, and what can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from expunge.ledger.canonical import GENESIS, link, read_line

Code = Literal[
    "unreadable", "edited", "gap", "order", "incomplete", "missing", "truncated", "rewritten", "signature", "unsigned", "foreign"
]

_MOST = 100  #: problems that are listed; the rest is counted


@dataclass(frozen=True)
class Problem:
    """Something that must not be.

    Attributes:
        code: what kind.

            - ``unreadable``: a line is no record, or not in its only spelling;
            - ``edited``: a record does not fit its digest;
            - ``gap``: numbers are left out; ``order``: a number comes late, or twice;
            - ``incomplete``: the last line does not end (a crash, or it is being written);
            - ``missing``: a file is not there;
            - ``truncated``: a checkpoint was signed for records that are not there;
            - ``rewritten``: a checkpoint was signed for other records;
            - ``signature``: a checkpoint is not signed by the key, or not in its chain;
            - ``unsigned``: there is no checkpoint;
            - ``foreign``: a checkpoint or a file is of another log.
        where: file and line.
        what: one sentence.
    """

    code: Code
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.code})"


class Problems:
    """A list that does not grow without end."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.more = 0

    def add(self, code: Code, where: str, what: str) -> None:
        """One more."""
        if len(self.listed) < _MOST:
            self.listed.append(Problem(code, where, what))
        else:
            self.more += 1


class Chain:
    """Takes lines one by one, and says which do not follow from those before.

    Args:
        number: name of the field that counts.
        problems: where they are noted.
        head: digest of the record before the first.
        count: its number.
    """

    def __init__(self, number: str, problems: Problems, head: str = GENESIS, count: int = 0) -> None:
        self.number, self.problems = number, problems
        self.head: str | None = head
        self.count = count

    def take(self, line: bytes, where: str) -> dict[str, Any] | None:
        """The record of a line, with its digest under ``hash``; none if it cannot be read."""
        due = self.count + 1
        try:
            record, digest = read_line(line)
        except ValueError as error:
            self.problems.add("unreadable", where, f"record {due} cannot be read: {_said(error)}")
            self.head, self.count = None, due
            return None
        n = record.get(self.number)
        if not isinstance(n, int) or isinstance(n, bool):
            self.problems.add("unreadable", where, f"record {due} has no number")
            self.head, self.count = None, due
            return None
        if n < due:
            self.problems.add("order", where, f"record {n} stands where {due} should")
            return {**record, "hash": digest}
        if n > due:
            missing = f"record {due} is" if n == due + 1 else f"records {due} to {n - 1} are"
            self.problems.add("gap", where, f"{missing} not there")
        elif self.head is not None and link(self.head, record) != digest:
            self.problems.add("edited", where, f"record {n} does not fit its digest")
        self.head, self.count = digest, n
        return {**record, "hash": digest}


def _said(error: ValueError) -> str:
    return "it is no JSON" if "canonical" not in str(error) and "digest" not in str(error) else str(error)
