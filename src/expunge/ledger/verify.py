"""What an auditor checks, with the public key alone: that nothing was changed, taken away, put in or put elsewhere in a log.

Every byte of the log is under the chain, and the chain under the signatures up to the last checkpoint. What follows it (at most
``checkpoint_every`` records, of a server that is running) could have been written anew by who holds the log; the report says how
many records these are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.ledger.canonical import moment, read_line
from expunge.ledger.chain import Chain, Problem, Problems
from expunge.ledger.checkpoints import Checkpoint, read_checkpoints
from expunge.ledger.keys import Public
from expunge.ledger.log import log_files
from expunge.ledger.periods import commitment, turns
from expunge.ledger.protection import Entries
from expunge.ledger.records import decisions

if TYPE_CHECKING:
    from expunge.guards.policy import Policy


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        log: id of the log.
        files: how many there are.
        records: how many, by kind.
        first, last: when the first and the last was written.
        head: digest of the last record.
        checkpoints: how many are signed by the key.
        covered: number of the last record that a checkpoint covers.
        uncovered: records after it: in the chain, not under a signature.
        crashes: starts of the server that no stop came before.
        repairs: half-written lines that were cut after a crash.
        destroyed: periods whose keys were destroyed.
        problems: what must not be; none: the log holds.
        more: further problems, not listed.
    """

    log: str
    files: int
    records: Mapping[str, int]
    first: str
    last: str
    head: str
    checkpoints: int
    covered: int
    uncovered: int
    crashes: int
    repairs: int
    destroyed: tuple[str, ...]
    problems: tuple[Problem, ...]
    more: int

    @property
    def ok(self) -> bool:
        """Whether the log holds."""
        return not self.problems

    @property
    def exit_code(self) -> int:
        """0: it holds; 3: it does not."""
        return 0 if self.ok else 3

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.records.items()))
        said = [
            f"log {self.log or '?'}: {sum(self.records.values())} records ({kinds}) "
            f"in {self.files} file{'s' * (self.files != 1)}, {self.first or '?'} to {self.last or '?'}",
            f"{self.checkpoints} checkpoints; signed up to record {self.covered}, {self.uncovered} after it are not",
        ]
        if self.crashes or self.repairs:
            said.append(f"{self.crashes} crashes of the server, {self.repairs} half-written lines cut after one")
        if self.destroyed:
            said.append(f"{len(self.destroyed)} keys of periods destroyed, the last of {max(self.destroyed)}")
        said += [f"PROBLEM {p}" for p in self.problems]
        said += [f"and {self.more} problems more"] if self.more else []
        return [*said, "the log holds" if self.ok else "THE LOG DOES NOT HOLD"]


@dataclass
class _Seen:
    """What is gathered in one pass."""

    kinds: Counter[str]
    hashes: dict[int, str]
    log: str = ""
    first: str = ""
    last: str = ""
    running: bool = False
    every: int = 0
    crashes: int = 0
    destroyed: tuple[str, ...] = ()

    def take(self, record: Mapping[str, Any]) -> None:
        kind = str(record.get("kind"))
        self.kinds[kind] += 1
        at = str(record.get("at", ""))
        self.first, self.last = self.first or at, at
        if kind == "start":
            self.crashes += self.running
            self.running = True
            self.every = int(record.get("keeping", {}).get("checkpoint_every", 0))
        elif kind == "stop":
            self.running = False
        elif kind == "keys":
            self.destroyed += tuple(map(str, record.get("destroyed", ())))


def verify(folder: Path, public: Public, checkpoints: Path, *, ledger: Entries | None = None, first: int = 1) -> Report:
    """Check a log.

    Args:
        folder: its files.
        public: key of who signed.
        checkpoints: file of checkpoints, from where the server could not change it.
        ledger: the registry's, to check that it is the one whose heads were signed.
        first: number of the first file that must be there: those before it were put elsewhere, and are checked there.

    Raises:
        InputError: there is no log.
    """
    files = log_files(folder)
    if not files:
        raise InputError(f"There is no log in {str(folder)!r}.", "Name the folder that holds log-000001.jsonl.")
    problems = Problems()
    signed = read_checkpoints(checkpoints, public, problems)
    seen = _Seen(Counter(), dict.fromkeys((c.n for c in signed), ""))
    reader = _Reader(seen, problems, first)
    for number, path in files:
        if number >= first:
            reader.read(number, path)
    if reader.chain is None:
        problems.add("missing", folder.name, f"file {first} is not there")
    chain = reader.chain or Chain("n", problems)
    count, head = chain.count, chain.head or ""
    _hold(signed, seen, count, checkpoints.name, problems)
    if ledger is not None:
        _anchored(signed, ledger, checkpoints.name, problems)
    covered = max((c.n for c in signed if c.log == seen.log and seen.hashes.get(c.n) == c.hash), default=0)
    if signed and count - covered > (seen.every if seen.running else 0):
        most = f"at most {seen.every} may be" if seen.running else "the server was stopped, which signs all"
        problems.add("unsigned", checkpoints.name, f"{count - covered} records at the end are not signed, and {most}")
    return Report(
        seen.log, len(files), dict(seen.kinds), seen.first, seen.last, head, len(signed), covered, max(count - covered, 0),
        seen.crashes, seen.kinds["repair"], seen.destroyed, tuple(problems.listed), problems.more,
    )  # fmt: skip


class _Reader:
    """Goes through the files.

    Args:
        seen: what is gathered.
        problems: where they are noted.
        first: number of the first file that must be there.
    """

    def __init__(self, seen: _Seen, problems: Problems, first: int) -> None:
        self.seen, self.problems, self.first, self._due = seen, problems, first, first
        self.chain: Chain | None = None

    def read(self, number: int, path: Path) -> None:
        """The next file."""
        if number != self._due:
            missing = f"file {self._due} is" if number == self._due + 1 else f"files {self._due} to {number - 1} are"
            self.problems.add("missing", path.name, f"{missing} not there")
        self._due = number + 1
        with path.open("rb") as handle:
            head = handle.readline()
            if head:
                self._lines(itertools.chain([head], handle), self._begun(head, number, f"{path.name}:1"), path.name)
            else:
                self.problems.add("incomplete", path.name, "the file is empty")

    def _lines(self, lines: Iterable[bytes], chain: Chain, name: str) -> None:
        hashes = self.seen.hashes
        for at, line in enumerate(lines, 1):
            where = f"{name}:{at}"
            if not line.endswith(b"\n"):
                self.problems.add("incomplete", where, "the last line does not end: a crash, or the log is being written")
                break
            record = chain.take(line, where)
            if record is not None:
                self.seen.take(record)
                if record["n"] in hashes and chain.head == record["hash"]:
                    hashes[record["n"]] = record["hash"]

    def _begun(self, line: bytes, number: int, where: str) -> Chain:
        """The chain at a file's first line, which says what came before. What a first file says is believed only where the ones
        before it are not asked for."""
        chain = self.chain
        try:
            record, _ = read_line(line)
            said, log, before, n = record["file"], str(record["log"]), str(record["before"]), int(record["n"])
        except (ValueError, KeyError, TypeError):
            self.problems.add("unreadable", where, "the file does not begin as a file of a log does")
        else:
            self.seen.log = self.seen.log or log
            if said != number or log != self.seen.log:
                self.problems.add("foreign", where, f"it says that it is file {said} of log {log}")
            if chain is None and self.first > 1:
                chain = Chain("n", self.problems, before, n - 1)
            elif chain is not None and chain.head is not None and before != chain.head:
                self.problems.add("gap", where, "it does not follow from the end of the file before it")
        self.chain = chain or Chain("n", self.problems)
        return self.chain


def _hold(signed: Sequence[Checkpoint], seen: _Seen, count: int, name: str, problems: Problems) -> None:
    if not signed:
        problems.add("unsigned", name, "no checkpoint is signed by this key: the whole log could have been made anew")
    for checkpoint in signed:
        where = f"{name}:{checkpoint.index}"
        if checkpoint.log != seen.log:
            problems.add("foreign", where, f"it is of log {checkpoint.log}")
        elif checkpoint.n > count:
            problems.add("truncated", where, f"it was signed for {checkpoint.n} records, and there are {count}")
        elif (held := seen.hashes[checkpoint.n]) != checkpoint.hash and held:
            problems.add("rewritten", where, f"it was signed for another record {checkpoint.n}")


def _anchored(signed: Sequence[Checkpoint], ledger: Entries, name: str, problems: Problems) -> None:
    for checkpoint in signed:
        said = checkpoint.anchors.get("registry", "")
        if not said:
            continue
        seq, _, digest = said.partition(":")
        held = ledger.head(int(seq)) if seq.isdigit() else None
        if held != digest:
            what = "is not there" if held is None else "is another one"
            problems.add(
                "truncated" if held is None else "rewritten", f"{name}:{checkpoint.index}", f"entry {seq} of the registry {what}"
            )


# -- looking into it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A record that was made of a text.

    Attributes:
        where: file and line.
        what: as what it was committed to: ``asked`` (the last turn), ``conversation``, ``answer``.
        record: all of it.
    """

    where: str
    what: str
    record: Mapping[str, Any]


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """All records that can be read, each with its file and line; :func:`verify` says whether they are to be believed."""
    for _, path in log_files(folder):
        with path.open("rb") as handle:
            for at, line in enumerate(handle, 1):
                try:
                    record, digest = read_line(line)
                except ValueError:
                    continue
                yield f"{path.name}:{at}", {**record, "hash": digest}


def find(folder: Path, text: str | Conversation, keys: Mapping[str, bytes]) -> list[Found]:
    """Records that were made of a text, as the question, as the whole conversation, or as the answer.

    Args:
        folder: of the log.
        text: what was asked or said; case and white space do not count. All turns of a conversation count, in order.
        keys: of periods, by name (:meth:`expunge.ledger.periods.Periods.export`, from hexadecimal digits to bytes).
    """
    said = {"conversation": turns(text)} if isinstance(text, Conversation) else {"asked": text, "answer": text}
    out = []
    for where, record in records(folder):
        key = keys.get(str(record.get("period")))
        if record.get("kind") != "request" or key is None:
            continue
        held = record.get("commitments", {})
        out += [Found(where, k, record) for k, t in said.items() if held.get(k) == commitment(key, str(record["id"]), k, t)]
    return out


def seed_holds(record: Mapping[str, Any], seed: int, key: bytes) -> bool:
    """Whether an answer was drawn by a seed."""
    held = record.get("commitments", {}).get("seed")
    return held is not None and held == commitment(key, str(record["id"]), "seed", str(seed))


def decided_again(record: Mapping[str, Any], policy: Policy, conversation: Conversation) -> list[str]:
    """What differs if a policy looks at a request again; nothing: it decides as the record says, with equal scores to rounding.

    Compared is what the guards saw of the request itself, before the model answered.

    Args:
        record: of the request, from :func:`find`.
        policy: fitted as the server's was, with the targets that were hidden then.
        conversation: what was asked.
    """
    differs = [] if record["policy"] == policy.digest() else ["the policy is another one"]
    again = decisions(policy.open(conversation), policy.rows, lambda name: name)
    for was, now in zip(record.get("rows", ()), again, strict=False):
        hits = [[h for h in row["hits"] if h["hook"] == "request"] for row in (was, now)]
        where = f"row {was['row']} ({was['detector']})"
        if [h["target"] for h in hits[0]] != [h["target"] for h in hits[1]]:
            differs.append(f"{where} fires for other targets")
        elif any(a["score"] != b["score"] for a, b in zip(*hits, strict=True)):
            differs.append(f"{where} gives other scores")
    if len(record.get("rows", ())) != len(again):
        differs.append("the policy has another number of rows")
    return differs


@dataclass(frozen=True)
class Service:
    """Whether requests around a moment were decided with a target in force.

    Attributes:
        target: id.
        requests: how many were recorded between the two moments.
        guarded: how many of them under a policy that hid it.
        fired: how many of these a guard acted on for it.
    """

    target: str
    requests: int
    guarded: int
    fired: int


def served(folder: Path, target: str, begin: datetime, end: datetime) -> Service:
    """How requests from one moment to another (their times are to the minute) were decided with respect to a target.

    The registry says what was to be hidden, this says what was: a request counts as guarded if the last note of the policy before
    it names the target.
    """
    hidden: set[str] = set()
    total = guarded = fired = 0
    for _, record in records(folder):
        if record.get("kind") == "start":
            hidden = set()
        elif record.get("kind") == "policy":
            hidden = set(record["all"]) if "all" in record else (hidden | set(record["added"])) - set(record["dropped"])
        elif record.get("kind") == "request" and not record.get("canary") and begin <= moment(str(record["at"])) < end:
            total += 1
            guarded += target in hidden
            fired += any(h["target"] == target for row in record.get("rows", ()) for h in row["hits"])
    return Service(target, total, guarded, fired)


def activated(folder: Path) -> list[dict[str, Any]]:
    """Thresholds that were set when the guards were fitted, or fitted anew because a target came or went: each as
    :func:`expunge.ledger.records.thresholds` has it, with the moment ``at`` from which it held; the same one is named once."""
    found: list[dict[str, Any]] = []
    last: dict[int, dict[str, Any]] = {}
    for _, record in records(folder):
        if record.get("kind") == "policy":
            for said in record.get("thresholds", ()):
                if last.get(said["row"]) != said:
                    found.append({"at": record["at"], **said})
                last[said["row"]] = said
    return found
