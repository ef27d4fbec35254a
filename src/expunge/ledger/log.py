"""The log of a guarded server: one record a request, in a chain that cannot be changed unseen, without a word of what was said.

A folder of files ``log-000001.jsonl``..., one canonical JSON record a line. Each record carries
``hash = SHA-256(hash before || record)``; every so many records a signed checkpoint goes to another place
(:mod:`expunge.ledger.checkpoints`). Between two checkpoints who runs the server could still rewrite: choose
:attr:`Keeping.checkpoint_every` by what that is worth. What an auditor does with it: :mod:`expunge.ledger.verify`.

Beside requests there are records of kind ``file`` (a file begins), ``start`` and ``stop`` (of the server), ``repair`` (what a
crash left half written was cut), ``policy`` (which targets are hidden from here on), ``keys`` (keys of periods were destroyed)
and those of canaries.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from expunge.core.errors import ExpungeError, InputError
from expunge.core.files import alone
from expunge.core.settings import Settings
from expunge.ledger.appending import Lines
from expunge.ledger.canonical import GENESIS, moment, now, read_line, sealed_line, stamp
from expunge.ledger.chain import Chain, Problems
from expunge.ledger.checkpoints import Checkpoint, Checkpoints
from expunge.ledger.errors import LedgerFailed
from expunge.ledger.keys import KeyStore, Signer, mac
from expunge.ledger.periods import Every, Periods, commitment, period_of, turns
from expunge.ledger.records import Request, Versions, coarse, named, request_fields

if TYPE_CHECKING:
    from expunge.guards.decoding import Answer
    from expunge.guards.policy import Plan, Row
    from expunge.ledger.escrow import Escrow

_FILE = re.compile(r"log-(\d{6,})\.jsonl")
_QUIET = {"file", "start", "repair"}  # records that a log may hold without any checkpoint: a first start that was killed


class Keeping(Settings):
    """How a log is kept."""

    name: ClassVar[str] = "log"

    sync: Literal["each", "batched"] = Field(
        "each",
        description="when the disk is asked to hold a record: before the request is answered (each; requests that come together "
        "share one wait), or at most `interval` seconds later (batched: a power cut may lose these, a kill loses nothing)",
    )
    interval: float = Field(1.0, gt=0, le=60, description="seconds between two syncs, if batched")
    checkpoint_every: int = Field(100, ge=1, description="records between two signed checkpoints")
    rotate_bytes: int = Field(64 << 20, ge=4096, description="size at which a new file is begun")
    period: Every = Field("day", description="how long a key of commitments is used, and a file at most")
    keep_days: float = Field(30, ge=0, description="days after its period for which such a key is kept, then it is destroyed")


def log_files(folder: Path) -> list[tuple[int, Path]]:
    """Files of a log with their numbers, in order."""
    found = ((int(m[1]), p) for p in folder.glob("log-*.jsonl") if (m := _FILE.fullmatch(p.name)))
    return sorted(found)


class AuditLog:
    """A log that is written. One process writes a folder at a time; any number of threads.

    Args:
        folder: made if it is not there.
        keys: where keys of periods are kept; not on the same backup as the log.
        signer: who signs checkpoints.
        checkpoints: file of checkpoints, in another place: another disk, or one that lets nothing be changed.
        versions: what answers.
        keeping: how it is kept.
        anchor: heads to be signed with each checkpoint: ``lambda: {"registry": "%d:%s" % registry.head()}``.
        escrow: keeps some requests in full for an auditor; none: nothing is.
        publish: is handed each checkpoint's line: to send it where nobody here can reach it.
        clock: what time it is.

    Raises:
        InputError: another process writes it, or it was changed or cut since it was written.
        LedgerFailed: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        keys: KeyStore,
        signer: Signer,
        checkpoints: Path,
        *,
        versions: Versions,
        keeping: Keeping | None = None,
        anchor: Callable[[], Mapping[str, str]] = dict,
        publish: Callable[[bytes], None] | None = None,
        escrow: Escrow | None = None,
        clock: Callable[[], datetime] = now,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if checkpoints.resolve().parent == folder.resolve():
            raise InputError("The checkpoints would stand beside the log.", "Put them in another folder, best on another disk.")
        self.folder, self.versions, self.keeping = folder, versions, keeping or Keeping()
        self._anchor, self._publish, self._escrow, self._clock = anchor, publish, escrow, clock
        self._lock, self._sync_lock = threading.RLock(), threading.Lock()
        self._n, self._head, self._synced, self._number = 0, GENESIS, 0, 0
        self._at: dict[int, str] = {}
        self._hidden: frozenset[str] = frozenset()
        self._policy = self._last_error = self._period = ""
        self._over = threading.Event()
        with ExitStack() as stack:
            stack.enter_context(alone(folder))
            self._checkpoints = Checkpoints(checkpoints, signer)
            stack.callback(self._checkpoints.close)
            self._open()
            stack.callback(self._close_lines)
            self.pseudonyms = keys.make(f"pseudonyms-{self.log}")
            self.periods = Periods(keys, self.log, self.keeping.period, timedelta(days=self.keeping.keep_days), clock)
            self._begin()
            self._stack = stack.pop_all()
        self._syncer = threading.Thread(target=self._sync_now_and_then, daemon=True)
        if self.keeping.sync == "batched":
            self._syncer.start()

    # -- opening ---------------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Find the head of what is there; cut what a crash has left half written."""
        files = log_files(self.folder)
        self.log, torn, kinds = "", b"", set[str]()
        if files:
            self._number, path = files[-1]
            self._lines = Lines(path)
            torn = self._lines.cut()
            if not self._lines.size and self._number > 1:
                self._walk(files[-2][1], set())
            elif self._lines.size:
                kinds = self._walk(path, kinds)
        else:
            self._number = 1
            self._lines = Lines(self.folder / "log-000001.jsonl")
        self._check_last(kinds)
        if not self._lines.size:
            self.log = self.log or secrets.token_hex(8)
            self._append(self._file_record())
        if torn:
            digest = hashlib.sha256(torn).hexdigest()
            self._append({"kind": "repair", "at": stamp(self._clock()), "cut_bytes": len(torn), "cut_sha256": digest})

    def _walk(self, path: Path, kinds: set[str]) -> set[str]:
        lines = path.read_bytes().splitlines(keepends=True)
        problems = Problems()
        try:
            first, _ = read_line(lines[0])
            chain = Chain("n", problems, first["before"], first["n"] - 1)
            self.log, self._begun = str(first["log"]), stamp(moment(str(first["at"])))
        except (ValueError, KeyError, TypeError, IndexError, InputError):
            raise self._changed(f"{path.name} does not begin as a file of a log does") from None
        for at, line in enumerate(lines, 1):
            record = chain.take(line, f"{path.name}:{at}")
            if record is not None:
                kinds.add(str(record.get("kind")))
                self._at[record["n"]] = record["hash"]
        if problems.listed or chain.head is None:
            raise self._changed(str(problems.listed[0]))
        self._n, self._head = chain.count, chain.head
        return kinds

    def _check_last(self, kinds: set[str]) -> None:
        last = self._checkpoints.last
        if last is None:
            if kinds - _QUIET or self._number > 1:
                raise self._changed("its checkpoints are not there")
            return
        if self._n < last.n:
            raise self._changed(f"a checkpoint was signed for {last.n} records, and there are {self._n}")
        if last.log != self.log or self._at.get(last.n, last.hash) != last.hash:
            raise self._changed("its last checkpoint was signed for another log")

    def _changed(self, what: str) -> InputError:
        return InputError(
            f"The log in {str(self.folder)!r} was changed: {what}.",
            "Verify it, keep it aside, and begin a new one in another folder.",
        )

    def _begin(self) -> None:
        self.event("start", versions=self.versions.described(), keeping=self.keeping.model_dump(mode="json"))
        self.destroy_old_keys()
        with self._lock:
            self._checkpoint()

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def record(
        self,
        plan: Plan | None,
        answer: Answer | None,
        rows: Sequence[Row],
        *,
        policy: str,
        request: Request | None = None,
    ) -> str:
        """Write the record of a request; its random id. Call it before the last piece of the answer is sent.

        Args:
            plan: what its guards have decided; none where the request failed before there was one.
            answer: as it was sent; none where there is none.
            rows: of the policy.
            policy: its digest.
            request: what else is known of it.

        Raises:
            LedgerFailed: it could not be written; a server that must prove that it guards answers with an error then.
        """
        request = request or Request()
        made = secrets.token_hex(16)
        period, key = self.periods.current()
        if period != self._period:
            self._period = period
            self.destroy_old_keys()
        fields = request_fields(plan, answer, rows, request, self.pseudonym)
        said: dict[str, str] = {}
        if plan is not None:
            said |= {"asked": plan.asked.asked, "conversation": turns(plan.asked)}
        if answer is not None:
            said["answer"] = answer.text
        if request.seed is not None:
            said["seed"] = str(request.seed)
        record = {
            "kind": "request", "id": made, "at": coarse(self._clock()), "policy": policy, "period": period, **fields,
            **self.versions.described(), "commitments": {kind: commitment(key, made, kind, text) for kind, text in said.items()},
        }  # fmt: skip
        if self._escrow is not None and plan is not None and not request.canary and self._escrow.drawn():
            self._boxed(self._escrow, record, plan, answer)
        else:
            self._add(record)
        return made

    def _boxed(self, escrow: Escrow, record: dict[str, Any], plan: Plan, answer: Answer | None) -> None:
        """Keep a request in full, too: both are there, or neither."""
        try:
            digest = escrow.put(record["id"], plan.asked, answer.text if answer is not None else None)
            self._add({**record, "escrow": digest})
        except LedgerFailed:
            escrow.take_back(record["id"])
            raise

    def event(self, kind: str, **fields: Any) -> None:
        """Write a record that is about no request. Nothing that anybody said or wrote may stand in it.

        Raises:
            LedgerFailed: it could not be written.
        """
        self._add({"kind": kind, "at": stamp(self._clock()), **fields})

    def policy(self, digest: str, targets: Iterable[str], thresholds: Sequence[Mapping[str, Any]] = ()) -> None:
        """Note which targets are hidden from here on: what has changed since the last note; nothing if nothing has.

        Args:
            digest: of the policy.
            targets: ids.
            thresholds: of its detectors now, from :func:`expunge.ledger.records.thresholds`.

        Raises:
            LedgerFailed: it could not be written.
        """
        with self._lock:
            hidden = frozenset(named(t, self.pseudonym) for t in targets)
            if digest == self._policy and hidden == self._hidden:
                return
            first = not self._policy
            more = (
                {"all": sorted(hidden)}
                if first
                else {"added": sorted(hidden - self._hidden), "dropped": sorted(self._hidden - hidden)}
            )
            said = {"thresholds": [dict(t) for t in thresholds]} if thresholds else {}
            at = self._add_locked({"kind": "policy", "at": stamp(self._clock()), "policy": digest, **more, **said})
            self._policy, self._hidden = digest, hidden
        self._durable(at)

    def pseudonym(self, name: str) -> str:
        """A name as it stands in this log: 16 hexadecimal digits that say nothing without this log's own key."""
        return mac(self.pseudonyms, "pseudonym", name.encode("utf-8", "surrogatepass")).hex()[:16]

    def destroy_old_keys(self) -> list[str]:
        """Destroy the keys of periods (and boxes in escrow) that have been kept for long enough, and note that; which."""
        over = self.periods.over()
        boxes = self._escrow.destroy_old() if self._escrow else 0
        if over or boxes:
            for period in over:
                self.periods.destroy(period)
            self.event("keys", destroyed=over, boxes=boxes)
        return over

    def checkpoint(self) -> Checkpoint:
        """Sign and keep a checkpoint now.

        Raises:
            LedgerFailed: it could not be kept.
        """
        with self._lock:
            return self._checkpoint()

    @property
    def overdue(self) -> int:
        """Records since the last checkpoint; more than :attr:`Keeping.checkpoint_every`: the place of checkpoints fails."""
        last = self._checkpoints.last
        return self._n - (last.n if last else 0)

    @property
    def failing(self) -> str:
        """What fails at present beside the log itself, in one sentence; empty: nothing."""
        return self._last_error

    @property
    def head(self) -> tuple[int, str]:
        """Number and digest of the last record."""
        with self._lock:
            return self._n, self._head

    def close(self) -> None:
        """Note the end, sign it and close the files. A second time it does nothing."""
        if self._over.is_set():
            return
        self._over.set()
        if self._syncer.is_alive():
            self._syncer.join()
        with self._lock, self._stack:
            self._add_locked({"kind": "stop", "at": stamp(self._clock())})
            self._checkpoint()

    def _close_lines(self) -> None:
        self._lines.close()  # the last file, not the one it was opened with

    def _add(self, record: dict[str, Any]) -> None:
        with self._lock:
            at = self._add_locked(record)
        self._durable(at)

    def _add_locked(self, record: dict[str, Any]) -> int:
        if self._lines.size >= self.keeping.rotate_bytes or self._outlived():
            self._rotate()
        self._append(record)
        if self.overdue >= self.keeping.checkpoint_every:
            try:
                self._checkpoint()
            except LedgerFailed as error:  # the record stands; the next one tries again, and `overdue` tells
                self._last_error = str(error)
        return self._n

    def _outlived(self) -> bool:
        """Whether the file was begun in an earlier period; a clock that is put back changes nothing."""
        every = self.keeping.period
        return period_of(moment(self._begun), every) < period_of(self._clock(), every)

    def _append(self, record: dict[str, Any]) -> None:
        line, digest = sealed_line(self._head, {"n": self._n + 1, **record})
        self._lines.append(line)
        self._n, self._head = self._n + 1, digest
        self._written = (self._lines, self._n)  # read without the lock by who waits for the disk

    def _file_record(self) -> dict[str, Any]:
        self._begun = stamp(self._clock())
        return {
            "kind": "file",
            "at": self._begun,
            "file": self._number,
            "log": self.log,
            "before": self._head,
            "version": 1,
        }

    def _rotate(self) -> None:
        self._lines.sync()
        fresh = Lines(self.folder / f"log-{self._number + 1:06d}.jsonl")
        old, self._lines = self._lines, fresh
        self._number += 1
        begun = self._begun
        try:
            self._append(self._file_record())
        except LedgerFailed:
            self._lines, self._number, self._begun = old, self._number - 1, begun
            fresh.close()
            with suppress(OSError):
                fresh.path.unlink()
            raise
        with self._sync_lock:  # nobody waits for it any more
            old.close()
        with suppress(ExpungeError):
            self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        self._lines.sync()  # what is signed must be there after a power cut, too
        with self._sync_lock:
            self._synced = max(self._synced, self._n)
        try:
            anchors = dict(self._anchor())
        except ExpungeError:
            anchors = {}
        made = self._checkpoints.add(self.log, self._n, self._head, at=stamp(self._clock()), anchors=anchors)
        self._last_error = (
            "" if anchors or self._anchor is dict else "The heads to be signed with a checkpoint could not be read."
        )
        if self._publish is not None:
            try:
                self._publish(made.line)
            except Exception as error:  # whatever somebody's own function raises, the checkpoint stands
                self._last_error = f"Publishing a checkpoint failed: {type(error).__name__}."
        return made

    def _durable(self, n: int) -> None:
        """Wait until the disk holds a record, if that is the policy; those that wait together share one sync."""
        if self.keeping.sync == "each":
            self._sync(n)

    def _sync(self, n: int) -> None:
        with self._sync_lock:
            if self._synced >= n:
                return
            lines, written = self._written
            lines.sync()
            self._synced = written

    def _sync_now_and_then(self) -> None:
        while not self._over.wait(self.keeping.interval):
            with suppress(LedgerFailed):  # the file is marked then, and the next record raises
                self._sync(self._n)
