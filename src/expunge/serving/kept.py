"""A server whose targets and records are kept: its store is a registry, its record of requests a log for auditors."""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from expunge.adapters.language import LanguageAdapter
from expunge.core.files import digest_json
from expunge.guards.decoding import Answer
from expunge.guards.policy import Plan, Policy
from expunge.guards.target import Target
from expunge.ledger import errors
from expunge.ledger.canonical import now
from expunge.ledger.escrow import Escrow, EscrowSettings
from expunge.ledger.following import Mirror, Scheduled
from expunge.ledger.keys import KeyStore, Signer, mac
from expunge.ledger.log import AuditLog, Keeping
from expunge.ledger.places import Places
from expunge.ledger.records import Request, Versions, thresholds
from expunge.ledger.registry import STATES, Registry, Stored
from expunge.serving.access import PROBING
from expunge.serving.store import Conflict, Entry, Unkept


@contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except errors.LedgerFailed as error:
        raise Unkept(error.full) from None


class RegistryStore:
    """Keeps forget requests in a registry, which other processes may share; see :class:`~expunge.serving.store.TargetStore`.

    Args:
        registry: where.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry, self._mirror = registry, Mirror(registry)

    @_kept()
    def add(self, key: str | None, digest: str, target: Target, reason: str) -> Entry:
        """Keep one. Whether the words are the same the registry tells itself, so the digest is not looked at."""
        if target.until is not None and target.until.tzinfo is None:
            target = target.model_copy(update={"until": target.until.replace(tzinfo=UTC)})
        try:
            return _entry(self.registry.request(key or secrets.token_hex(16), target, reason))
        except errors.Conflict:
            raise Conflict from None

    @_kept()
    def entries(self, state: str | None, after: str | None, limit: int) -> list[Entry]:
        """Entries in the order in which they came; behind one that is not there, from the first on."""
        chosen = next((s for s in STATES if s == state), None)
        try:
            held = self.registry.targets(chosen, after=after or "", limit=limit)
        except errors.NoSuchTarget:
            held = self.registry.targets(chosen, limit=limit)
        return [_entry(s) for s in held]

    @_kept()
    def entry(self, target: str) -> Entry | None:
        """One of them."""
        try:
            return _entry(self.registry.show(target))
        except errors.NoSuchTarget:
            return None

    @_kept()
    def end(self, target: str, state: str) -> Entry | None:
        """Withdraw it, or let all expire whose time is over."""
        if state == "expired":
            self.registry.expire()
            return self.entry(target)
        try:
            return _entry(self.registry.withdraw(target))
        except errors.NoSuchTarget:
            return None

    @_kept()
    def active(self) -> list[Target]:
        """What is to be hidden now; what has not changed since the last call costs nothing."""
        return self._mirror.active()


@dataclass(frozen=True)
class State:
    """What a server keeps in a folder of its own.

    ``registry.db`` (unless the registry is elsewhere), ``log/``, ``sign.pem`` with its public half, and, unless they go
    elsewhere, ``checkpoints/``, ``keys/``, ``master.key`` and ``escrow/``.

    Attributes:
        registry: of targets.
        log: of requests.
        keys: that all is kept under.
        guard: secret of the guards: the registry's own, unless another was given. So it is the same in all servers that share
            the registry, and after a restart.
        tidying: destroys keys whose time is over.
        clock: what time it is.
    """

    registry: Registry
    log: AuditLog
    keys: KeyStore
    guard: bytes
    tidying: Scheduled
    clock: Callable[[], datetime] = now

    @classmethod
    def open(
        cls,
        folder: Path,
        versions: Versions,
        *,
        registry: str | None = None,
        checkpoints: Path | None = None,
        places: Places | None = None,
        guard: bytes | None = None,
        keeping: Keeping | None = None,
        escrow: EscrowSettings | None = None,
        clock: Callable[[], datetime] = now,
    ) -> State:
        """Open what is there, or begin it.

        Args:
            folder: made if it is not there, for its owner alone.
            versions: what answers.
            registry: of a database, ``postgresql://...``; none: a file in the folder.
            checkpoints: file for signed heads of the log, best on another disk.
            places: of the keys; none: in the folder.
            guard: secret of the guards; none: the registry's.
            keeping: how the log is kept.
            escrow: which requests an auditor gets in full; none: none.
            clock: what time it is.

        Raises:
            InputError: another process writes the log, or it was changed since; or a key is missing.
            LedgerFailed: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = (places or Places(folder)).store()
        boxes = None if escrow is None else Escrow(
            folder / "escrow", Path(escrow.auditor), share=escrow.share, keep=timedelta(days=escrow.keep_days), clock=clock
        )  # fmt: skip
        held = Registry(registry or folder / "registry.db", keys, clock=clock)
        secret = guard or held.guard_key
        assets = {
            **versions.assets,
            "guard_key": mac(secret, "fingerprint").hex()[:16],
        }  # tells an auditor that it stayed the same
        try:
            log = AuditLog(
                folder / "log", keys, Signer(folder / "sign.pem"), checkpoints or folder / "checkpoints" / "checkpoints.jsonl",
                versions=replace(versions, assets=assets), anchor=lambda: {"registry": "{}:{}".format(*held.head())},
                keeping=keeping, escrow=boxes, clock=clock,
            )  # fmt: skip
        except BaseException:
            held.close()
            raise
        tidying = Scheduled(log.destroy_old_keys, 3600)  # keys of periods go on time, whether or not requests come
        tidying.start()
        return cls(held, log, keys, secret, tidying, clock)

    def close(self) -> None:
        """Sign what is not signed yet, and let go of both."""
        self.tidying.stop()
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

    Args:
        log: where.
    """

    policy: Policy

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self._lock = threading.Lock()
        self._hidden: frozenset[str] | None = None
        self._digest = ""

    def of(self, policy: Policy) -> None:
        """Keep records of this policy's decisions."""
        self.policy = policy

    async def answered(self, client: str, plan: Plan, answer: Answer, seconds: float) -> None:
        """A request was answered: its record is on the disk, or with the system, when this returns."""
        await asyncio.to_thread(self._record, client, plan, answer, "", seconds)

    async def given_up(self, client: str, plan: Plan, why: str, seconds: float) -> None:
        """A request got no answer."""
        await asyncio.to_thread(self._record, client, plan, None, re.sub(r"\W+", "_", why), seconds)

    def note(self) -> str:
        """Digest of the policy; which targets it hides, and its thresholds, stand in the log when this returns."""
        with self._lock:
            hidden = frozenset(self.policy.targets)
            if hidden != self._hidden:
                self._digest = self.policy.digest()
                self.log.policy(self._digest, hidden, thresholds(self.policy))
                self._hidden = hidden
            return self._digest

    def _record(self, client: str, plan: Plan, answer: Answer | None, why: str, seconds: float) -> None:
        digest = self.note()
        own = client == PROBING.name
        request = Request(tenant=client, error=why, counts={"milliseconds": round(seconds * 1000)}, canary=own)
        self.log.record(plan, answer, self.policy.rows, policy=digest, request=request)
