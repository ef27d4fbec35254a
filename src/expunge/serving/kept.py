"""A server whose targets and records are kept: its store is a registry, its record of requests a log for auditors."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import threading
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from expunge.adapters.language import LanguageAdapter
from expunge.core.files import digest_json
from expunge.guards.decoding import Answer
from expunge.guards.policy import Plan, Policy
from expunge.guards.target import Target
from expunge.ledger import errors
from expunge.ledger.following import Mirror
from expunge.ledger.keys import VARIABLE, KeyStore, MasterKey, Signer
from expunge.ledger.log import AuditLog
from expunge.ledger.records import Request, Versions
from expunge.ledger.registry import STATES, Registry, Stored
from expunge.serving.store import Conflict, Entry


class RegistryStore:
    """Keeps forget requests in a registry, which other processes may share; see :class:`~expunge.serving.store.TargetStore`.

    Args:
        registry: where.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry, self._mirror = registry, Mirror(registry)

    def add(self, key: str | None, digest: str, target: Target, reason: str) -> Entry:
        """Keep one. Whether the words are the same the registry tells itself, so the digest is not looked at."""
        if target.until is not None and target.until.tzinfo is None:
            target = target.model_copy(update={"until": target.until.replace(tzinfo=UTC)})
        try:
            return _entry(self.registry.request(key or secrets.token_hex(16), target, reason))
        except errors.Conflict:
            raise Conflict from None

    def entries(self, state: str | None, after: str | None, limit: int) -> list[Entry]:
        """Entries in the order in which they came; behind one that is not there, from the first on."""
        chosen = next((s for s in STATES if s == state), None)
        try:
            held = self.registry.targets(chosen, after=after or "", limit=limit)
        except errors.NoSuchTarget:
            held = self.registry.targets(chosen, limit=limit)
        return [_entry(s) for s in held]

    def entry(self, target: str) -> Entry | None:
        """One of them."""
        try:
            return _entry(self.registry.show(target))
        except errors.NoSuchTarget:
            return None

    def end(self, target: str, state: str) -> Entry | None:
        """Withdraw it, or let all expire whose time is over."""
        if state == "expired":
            self.registry.expire()
            return self.entry(target)
        try:
            return _entry(self.registry.withdraw(target))
        except errors.NoSuchTarget:
            return None

    def active(self) -> list[Target]:
        """What is to be hidden now; what has not changed since the last call costs nothing."""
        return self._mirror.active()


@dataclass(frozen=True)
class State:
    """What a server keeps in a folder of its own.

    ``registry.db`` (unless the registry is elsewhere), ``keys/`` (wrapped by ``master.key``, or the master key of the
    environment), ``log/``, ``sign.pem`` with its public half, and, unless they go elsewhere, ``checkpoints/``.

    Attributes:
        registry: of targets.
        log: of requests.
    """

    registry: Registry
    log: AuditLog

    @classmethod
    def open(cls, folder: Path, versions: Versions, *, registry: str | None = None, checkpoints: Path | None = None) -> State:
        """Open what is there, or begin it.

        Args:
            folder: made if it is not there, for its owner alone.
            versions: what answers.
            registry: of a database, ``postgresql://...``; none: a file in the folder.
            checkpoints: file for signed heads of the log, best on another disk.

        Raises:
            InputError: another process writes the log, or it was changed since; or a key is missing.
            LedgerFailed: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        given = VARIABLE in os.environ
        master = MasterKey.from_environment() if given else MasterKey.from_file(folder / "master.key")
        keys = KeyStore(folder / "keys", master)
        held = Registry(registry or folder / "registry.db", keys)
        try:
            log = AuditLog(
                folder / "log", keys, Signer(folder / "sign.pem"), checkpoints or folder / "checkpoints" / "checkpoints.jsonl",
                versions=versions, anchor=lambda: {"registry": "{}:{}".format(*held.head())},
            )  # fmt: skip
        except BaseException:
            held.close()
            raise
        return cls(held, log)

    def close(self) -> None:
        """Sign what is not signed yet, and let go of both."""
        self.log.close()
        self.registry.close()


def versions_of(name: str, adapter: LanguageAdapter | None) -> Versions:
    """What answers: digests of a model, or the name of one behind another server."""
    if adapter is None:
        return Versions(digest_json({"upstream": name}))
    return Versions(adapter.fingerprint())


def _entry(stored: Stored) -> Entry:
    s = stored
    return Entry(s.id, s.state, s.requested, s.until, s.ended, s.scope, new=s.new)


class LoggedRequests:
    """Writes a record of each request into a log; see :class:`~expunge.serving.ledger.Ledger`.

    It is made before the server and told its policy after it: ``kept.policy = served.policy``.

    Args:
        log: where.
    """

    policy: Policy

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self._lock = threading.Lock()
        self._hidden: frozenset[str] | None = None
        self._digest = ""

    async def answered(self, client: str, plan: Plan, answer: Answer, seconds: float) -> None:
        """A request was answered: its record is on the disk, or with the system, when this returns."""
        await asyncio.to_thread(self._record, client, plan, answer, "", seconds)

    async def given_up(self, client: str, plan: Plan, why: str, seconds: float) -> None:
        """A request got no answer."""
        await asyncio.to_thread(self._record, client, plan, None, re.sub(r"\W+", "_", why), seconds)

    def note(self) -> str:
        """Digest of the policy; which targets it hides stands in the log when this returns."""
        with self._lock:
            hidden = frozenset(self.policy.targets)
            if hidden != self._hidden:
                self._digest = self.policy.digest()
                self.log.policy(self._digest, hidden)
                self._hidden = hidden
            return self._digest

    def _record(self, client: str, plan: Plan, answer: Answer | None, why: str, seconds: float) -> None:
        digest = self.note()
        request = Request(tenant=client, error=why, counts={"milliseconds": round(seconds * 1000)})
        self.log.record(plan, answer, self.policy.rows, policy=digest, request=request)
