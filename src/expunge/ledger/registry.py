"""The registry of what is to be hidden: encrypted, and never lost, doubled or half written once it was acknowledged.

What is said of a target stands under a data key of its own (AES-256-GCM), and each data key under the master key in a folder
apart from the database (:mod:`expunge.ledger.keys`). Withdrawing a target destroys its data key, so that its terms cannot be read
from old copies of the database either. In clear stand: a random id, what kinds of things there are and how many ("1 name, 2
examples"), the legal basis, and times. Every change is one transaction with its entry in a chained ledger, from which an auditor
reads when a target was to be hidden (:mod:`expunge.ledger.protection`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sql

from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.guards.target import Target, check_target
from expunge.ledger import database as db
from expunge.ledger.canonical import GENESIS, canonical, moment, now, sealed_line, stamp
from expunge.ledger.errors import Conflict, LedgerFailed, NoSuchTarget, Shredded
from expunge.ledger.keys import KeyStore, mac, opened, sealed

State = Literal["active", "withdrawn", "expired"]
Basis = Literal["erasure", "copyright", "court", "safety", "contract", "other"]

STATES: tuple[State, ...] = get_args(State)

_PAD = 512  # sealed bytes come in multiples, so that their number does not tell the length of a name
_ID = re.compile(r"[0-9a-f]{16}")
_KEY = 200  #: letters of an idempotency key at most


@dataclass(frozen=True)
class Stored:
    """A target as the registry knows it, without what it says.

    Attributes:
        id: opaque, given by the registry.
        state: whether it is hidden now, or why it is no more.
        basis: on what ground it was asked for.
        scope: kinds and numbers of what it holds.
        requested: since when it is hidden.
        until: when it ends by itself; none: never.
        ended: when it was withdrawn or expired.
        seq: number of the ledger's last entry when this was read; changes after it: :meth:`Registry.changes_since`.
        new: whether the call that gave this has made it; says nothing of what it is, so two that differ in it alone are equal.
    """

    id: str
    state: State
    basis: Basis
    scope: str
    requested: datetime
    until: datetime | None
    ended: datetime | None
    seq: int
    new: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Change:
    """An entry of the ledger, for who follows it.

    Attributes:
        seq: number of the entry.
        kind: what happened.
        id: of the target.
        target: what is to be hidden from now on; none where the target has ended, be it by a later entry.
    """

    seq: int
    kind: Literal["requested", "withdrawn", "expired"]
    id: str
    target: Target | None


class Registry:
    """Targets in a database. One object serves all threads of a process; several processes may share a database and a key folder.

    Args:
        where: path of an SQLite file, or a URL of PostgreSQL.
        keys: where data keys are kept; not on the same backup as the database.
        clock: what time it is.

    Raises:
        InputError: the database has tables of another version, or belongs to other keys.
        LedgerFailed: it does not answer.
    """

    def __init__(self, where: str | Path, keys: KeyStore, *, clock: Callable[[], datetime] = now) -> None:
        self._db, self._keys, self._clock = db.Database(where), keys, clock
        try:
            self._id, self._own = self._open()
            self._shred()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> tuple[str, bytes]:
        with self._db.write() as connection:
            self._db.create(connection)
            held = {row.name: row.value for row in connection.execute(sql.select(db.facts))}
            if not held:
                name = secrets.token_hex(8)
                own = self._keys.make(f"registry-{name}")
                held = {"schema": db.SCHEMA, "registry": name, "check": mac(own, "check").hex()}
                connection.execute(db.facts.insert(), [{"name": k, "value": v} for k, v in held.items()])
                return name, own
        if held.get("schema") != db.SCHEMA:
            raise InputError(
                f"The registry has tables of version {held.get('schema')}; this Expunge reads version {db.SCHEMA}.",
                "Use the Expunge that made it, or begin a new registry.",
            )
        try:
            own = self._keys.get(f"registry-{held['registry']}")
        except Shredded:
            raise InputError(
                "The key folder is not the one of this registry.", "Name the folder that it was made with."
            ) from None
        if mac(own, "check").hex() != held["check"]:
            raise InputError("The key folder is not the one of this registry.", "Name the folder that it was made with.")
        return held["registry"], own

    def close(self) -> None:
        """End the connections."""
        self._db.close()

    @property
    def guard_key(self) -> bytes:
        """Key for digests and noise of guards: the same in all processes that share this registry, and after a restart."""
        return mac(self._own, "guards")

    def probe_key(self, target: str) -> bytes:
        """Key for the canaries of a target: it follows from the target's data key, and is destroyed with it.

        Raises:
            Shredded: the target has ended, or was never there.
        """
        return mac(self._keys.get(self._name(target)), "probes")

    def request(
        self, idempotency_key: str, target: Target, reason: str = "", until: datetime | None = None, *, basis: Basis = "other"
    ) -> Stored:
        """Hide a target; it is kept when this returns.

        Asked again with the same key and the same words, the answer is the same and nothing is done. Once a target has ended its
        words are gone, so a key that is used again then gives the ended target, whatever is asked with it.

        Args:
            idempotency_key: chosen by who asks, new for each wish, 1 to 200 letters.
            target: without an id, or with one that says nothing (16 hexadecimal digits), which is taken if it is new.
            reason: why, in words; encrypted with the target.
            until: when it ends; none: ``target.until``.
            basis: the ground in law; in clear.

        Raises:
            Conflict: the key was used for something else.
            InputError: the target hides nothing, has an id, or has ended already.
            LedgerFailed: it could not be kept.
        """
        target, until = self._checked(idempotency_key, target, until, basis)
        said = target.model_dump(mode="json", exclude={"id", "until"})
        body = canonical({"target": said, "reason": reason, "until": until and stamp(until), "basis": basis})
        idempotency = mac(self._own, "idempotency", idempotency_key.encode()).hex()
        with self._db.write() as connection:
            row = connection.execute(sql.select(db.targets).where(db.targets.c.idempotency == idempotency)).first()
            if row is not None:
                return self._again(connection, row, body)
            if until is not None and until <= self._clock():
                raise InputError(f"The target ends at {stamp(until)}, which is past.", "Give a later time, or none.")
            made = target.id or secrets.token_hex(8)
            if connection.execute(sql.select(db.targets.c.id).where(db.targets.c.id == made)).first():
                raise InputError("There is a target with this id already.", "Leave it out: the registry gives one.")
            key = self._keys.make(self._name(made))
            at = self._time(connection)
            values = {
                "id": made, "idempotency": idempotency, "number": self._last(connection)[0] + 1, "state": "active",
                "basis": basis, "scope": target.summary(), "requested": at, "until": until and stamp(until), "ended": None,
                "body": mac(key, "body", body).hex(),
                "sealed": sealed(key, _padded(canonical({"target": said, "reason": reason})), self._bound(made)),
            }  # fmt: skip
            connection.execute(db.targets.insert(), values)
            more = {k: values[k] for k in ("basis", "scope", "until")}
            self._enter(connection, {"kind": "requested", "target": made, "at": at, **more})
            return replace(self._stored(connection, made), new=True)

    def _checked(self, key: str, target: Target, until: datetime | None, basis: Basis) -> tuple[Target, datetime | None]:
        if not 1 <= len(key) <= _KEY:
            raise InputError(f"The idempotency key has {len(key)} letters; it must have 1 to {_KEY}.", "Give a random one.")
        if target.id and not _ID.fullmatch(target.id):
            raise InputError(
                "The target has an id that may say something.", "Leave it out: the registry gives one that does not."
            )
        if basis not in get_args(Basis):
            raise InputError(f"There is no basis {basis!r}.", f"Use one of {', '.join(get_args(Basis))}.")
        if until is not None and target.until is not None and until != target.until:
            raise InputError("The target is said to end at two times.", "Give one.")
        check_target(target)
        until = until or target.until
        if until is not None:
            stamp(until)
        return target, until

    def _again(self, connection: sql.Connection, row: Any, body: bytes) -> Stored:
        if row.state == "active":
            try:
                same = secrets.compare_digest(mac(self._keys.get(self._name(row.id)), "body", body).hex(), row.body)
            except Shredded:
                raise _lost(row.id) from None
            if not same:
                raise Conflict("This idempotency key was used for another request.", "Give each request a key of its own.")
        return self._stored(connection, row.id)

    def withdraw(self, target: str) -> Stored:
        """Hide a target no more and destroy what was said of it; one that has ended already is left as it is.

        Raises:
            NoSuchTarget: it was never there.
            LedgerFailed: it could not be kept; the target is still hidden.
        """
        with self._db.write() as connection:
            if self._stored(connection, target).state == "active":
                self._end(connection, target, "withdrawn")
            stored = self._stored(connection, target)
        self._keys.drop(self._name(target))
        return stored

    def expire(self) -> list[str]:
        """End all targets whose time is over, and destroy what was said of them; their ids."""
        over = sql.select(db.targets.c.id).where(db.targets.c.state == "active", db.targets.c.until <= stamp(self._clock()))
        with self._db.read() as connection:
            if connection.execute(over.limit(1)).first() is None:
                return []
        with self._db.write() as connection:
            ids = [row.id for row in connection.execute(over.order_by(db.targets.c.until, db.targets.c.id))]
            for target in ids:
                self._end(connection, target, "expired")
        for target in ids:
            self._keys.drop(self._name(target))
        return ids

    def show(self, target: str) -> Stored:
        """A target without its words.

        Raises:
            NoSuchTarget: it was never there.
        """
        with self._db.read() as connection:
            return self._stored(connection, target)

    def words(self, target: str) -> tuple[Target, str]:
        """What a target says, and the reason that was given.

        Raises:
            NoSuchTarget: it was never there.
            Shredded: it has ended.
        """
        with self._db.read() as connection:
            row = connection.execute(sql.select(db.targets).where(db.targets.c.id == target)).first()
        if row is None:
            raise _unknown()
        return self._opened(row)

    def targets(self, state: State | None = None, *, after: str = "", limit: int = 1000) -> list[Stored]:
        """Targets in the order in which they were asked for.

        Args:
            state: only those; none: all.
            after: id behind which to go on.
            limit: at most.

        Raises:
            NoSuchTarget: there is none with the id ``after``.
        """
        held = sql.select(db.targets).order_by(db.targets.c.number).limit(limit)
        held = held if state is None else held.where(db.targets.c.state == state)
        with self._db.read() as connection:
            if after:
                before = sql.select(db.targets.c.number).where(db.targets.c.id == after)
                if connection.execute(before).first() is None:
                    raise _unknown()
                held = held.where(db.targets.c.number > before.scalar_subquery())
            seq = self._last(connection)[0]
            return [_stored(row, seq) for row in connection.execute(held)]

    def active(self) -> list[Target]:
        """All that is to be hidden now, with its words, in the order it was asked for: what a server begins with."""
        return self.snapshot()[0]

    def snapshot(self) -> tuple[list[Target], int]:
        """:meth:`active`, and the number of the last entry that it holds: :meth:`changes_since` goes on from there."""
        t = db.targets.c
        held = sql.select(db.targets).where(t.state == "active").order_by(t.number)
        with self._db.read() as connection:
            seq = self._last(connection)[0]
            rows = connection.execute(held).all()
        at = stamp(self._clock())
        found = (self._target(row) for row in rows if row.until is None or row.until > at)
        return [t for t in found if t is not None], seq

    def changes_since(self, seq: int, *, limit: int = 1000) -> list[Change]:
        """What has happened after an entry, in order, and no entry is ever passed over. Asked with the last number seen, it costs
        one look at an index.

        Args:
            seq: number of the last entry that is known; 0: none.
            limit: at most.
        """
        e, t = db.entries.c, db.targets
        held = sql.select(e.seq, e.line, t).join(t, t.c.id == e.target).where(e.seq > seq).order_by(e.seq).limit(limit)
        with self._db.read() as connection:
            rows = connection.execute(held).all()
        found = []
        for row in rows:
            kind = json.loads(row.line)["kind"]
            begun = kind == "requested" and row.state == "active"
            found.append(Change(row.seq, kind, row.id, self._target(row) if begun else None))
        return found

    def entries(self, after: int = 0, *, limit: int | None = None) -> list[bytes]:
        """Lines of the ledger, each with its line end, as :func:`expunge.ledger.protection.read_entries` checks them."""
        held = sql.select(db.entries.c.line).where(db.entries.c.seq > after).order_by(db.entries.c.seq).limit(limit)
        with self._db.read() as connection:
            return [row.line.encode() + b"\n" for row in connection.execute(held)]

    def export(self, path: Path) -> int:
        """Write all entries to a file for an auditor; how many."""
        lines = self.entries()
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(lines))
        return len(lines)

    def head(self) -> tuple[int, str]:
        """Number and digest of the last entry: a checkpoint of the log signs them, so the ledger cannot be rewritten either."""
        with self._db.read() as connection:
            return self._last(connection)

    def tidy(self) -> int:
        """Destroy data keys of requests that were never acknowledged (the process was killed, or the disk was full); how many.

        Call it while no request is being written, and never on a registry that was put back from a backup: the keys of what
        the backup does not know would be destroyed.
        """
        with self._db.read() as connection:
            known = {self._name(row.id) for row in connection.execute(sql.select(db.targets.c.id))}
        lost = [name for name in self._keys.names(self._name("")) if name not in known]
        return sum(self._keys.drop(name) for name in lost)

    def _shred(self) -> None:
        """Finish what a killed process has begun: targets that have ended have no key."""
        kept = set(self._keys.names(self._name("")))
        with self._db.read() as connection:
            rows = connection.execute(sql.select(db.targets.c.id).where(db.targets.c.state != "active"))
            ended = {self._name(row.id) for row in rows}
        for name in kept & ended:
            self._keys.drop(name)

    def _name(self, target: str) -> str:
        return f"target-{self._id}-{target}"

    def _bound(self, target: str) -> bytes:
        return f"expunge target\0{self._id}\0{target}".encode()

    def _last(self, connection: sql.Connection) -> tuple[int, str]:
        held = sql.select(db.entries.c.seq, db.entries.c.hash).order_by(db.entries.c.seq.desc()).limit(1)
        row = connection.execute(held).first()
        return (row.seq, row.hash) if row is not None else (0, GENESIS)

    def _time(self, connection: sql.Connection) -> str:
        """This moment, but never before the last entry, however the clock was set."""
        held = sql.select(db.entries.c.line).order_by(db.entries.c.seq.desc()).limit(1)
        last = connection.execute(held).scalar()
        return max(stamp(self._clock()), json.loads(last)["at"] if last else "")

    def _enter(self, connection: sql.Connection, entry: dict[str, Any]) -> None:
        seq, before = self._last(connection)
        line, digest = sealed_line(before, {"registry": self._id, "seq": seq + 1, **entry})
        values = {"seq": seq + 1, "target": entry["target"], "line": line.decode().rstrip("\n"), "hash": digest}
        connection.execute(db.entries.insert(), values)

    def _end(self, connection: sql.Connection, target: str, kind: Literal["withdrawn", "expired"]) -> None:
        at = self._time(connection)
        change = db.targets.update().where(db.targets.c.id == target).values(state=kind, ended=at, sealed=None, body="")
        connection.execute(change)
        self._enter(connection, {"kind": kind, "target": target, "at": at})

    def _stored(self, connection: sql.Connection, target: str) -> Stored:
        row = connection.execute(sql.select(db.targets).where(db.targets.c.id == target)).first()
        if row is None:
            raise _unknown()
        return _stored(row, self._last(connection)[0])

    def _target(self, row: Any) -> Target | None:
        """What a row that was active says; none if it has ended meanwhile."""
        try:
            return self._opened(row)[0]
        except Shredded:
            if self.show(row.id).state == "active":
                raise _lost(row.id) from None
            return None

    def _opened(self, row: Any) -> tuple[Target, str]:
        if row.sealed is None:
            raise Shredded(f"The target {row.id} has ended: what was said of it is gone.")
        key = self._keys.get(self._name(row.id))
        try:
            held = json.loads(opened(key, row.sealed, self._bound(row.id)))
        except ValueError:
            raise LedgerFailed(
                f"What is kept of the target {row.id} does not open.", "Put the registry back from a copy."
            ) from None
        return Target(**held["target"], id=row.id, until=row.until and moment(row.until)), held["reason"]


def _stored(row: Any, seq: int) -> Stored:
    until, ended = (text and moment(text) for text in (row.until, row.ended))
    return Stored(row.id, row.state, row.basis, row.scope, moment(row.requested), until, ended, seq)


def _padded(data: bytes) -> bytes:
    return data + b" " * (-len(data) % _PAD)


def _unknown() -> NoSuchTarget:
    return NoSuchTarget("There is no target with this id.", "List them to see which there are.")


def _lost(target: str) -> LedgerFailed:
    return LedgerFailed(
        f"The data key of the active target {target} is not there.", "Put the key folder back, or withdraw the target."
    )
