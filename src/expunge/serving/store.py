"""Forget requests that come and go while the server runs: what the store holds is what the guards hide."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from expunge.core.errors import InputError
from expunge.guards.guarded import named
from expunge.guards.policy import Policy
from expunge.guards.target import Target
from expunge.serving.errors import Refused
from expunge.serving.telemetry import Telemetry


@dataclass(frozen=True)
class Entry:
    """A forget request, without what it hides.

    Attributes:
        id: opaque.
        state: active, withdrawn or expired.
        created, until, ended: times.
        summary: how much there is of what ("2 names").
        new: whether this call has made it.
    """

    id: str
    state: str
    created: datetime
    until: datetime | None
    ended: datetime | None
    summary: str
    new: bool = True


class Conflict(Exception):
    """The idempotency key belongs to another request."""


class Unkept(Exception):
    """The store can neither keep nor read anything now: its disk is full, or its database does not answer.

    Args:
        full: whether there is no room.
    """

    def __init__(self, full: bool) -> None:
        super().__init__("no room" if full else "no answer")
        self.full = full

    def refused(self) -> Refused:
        """What a client is told."""
        why = "there is no room left to keep it" if self.full else "what keeps forget requests does not answer"
        said = f"This was not done: {why}. What was acknowledged before stays hidden; ask again with the same idempotency key."
        return Refused(507 if self.full else 503, said, headers={"retry-after": "10"})


class TargetStore(Protocol):
    """Keeps forget requests. What a call has returned is kept, whatever happens then. Each may raise :class:`Unkept`."""

    def add(self, key: str | None, digest: str, target: Target, reason: str) -> Entry:
        """Keep one; the same key and digest give the entry that is there.

        Raises:
            Conflict: the key is there with another digest.
        """

    def entries(self, state: str | None, after: str | None, limit: int) -> list[Entry]:
        """Entries in the order in which they came."""

    def entry(self, target: str) -> Entry | None:
        """One of them."""

    def end(self, target: str, state: str) -> Entry | None:
        """Withdraw it, or let it expire; one that has ended stays as it is."""

    def active(self) -> list[Target]:
        """What is to be hidden now."""


class MemoryStore:
    """Keeps forget requests for as long as the process runs."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Target | None, Entry]] = {}
        self._keys: dict[str, tuple[str, str]] = {}

    def add(self, key: str | None, digest: str, target: Target, reason: str) -> Entry:
        """See :class:`TargetStore`."""
        if key is not None and key in self._keys:
            held, name = self._keys[key]
            if held != digest:
                raise Conflict
            return Entry(**{**vars(self._held[name][1]), "new": False})
        entry = Entry(target.id, "active", datetime.now(UTC), target.until, None, target.summary())
        self._held[target.id] = (target, entry)
        if key is not None:
            self._keys[key] = (digest, target.id)
        return entry

    def entries(self, state: str | None, after: str | None, limit: int) -> list[Entry]:
        """See :class:`TargetStore`."""
        names = list(self._held)
        start = names.index(after) + 1 if after in self._held else 0
        found = [self._held[n][1] for n in names[start:]]
        return [e for e in found if state is None or e.state == state][:limit]

    def entry(self, target: str) -> Entry | None:
        """See :class:`TargetStore`."""
        return self._held[target][1] if target in self._held else None

    def end(self, target: str, state: str) -> Entry | None:
        """See :class:`TargetStore`."""
        if target not in self._held:
            return None
        _, entry = self._held[target]
        if entry.state == "active":
            entry = Entry(**{**vars(entry), "state": state, "ended": datetime.now(UTC)})
            self._held[target] = (None, entry)
        return entry

    def active(self) -> list[Target]:
        """See :class:`TargetStore`."""
        return [t for t, e in self._held.values() if t is not None and e.state == "active"]


class Requests:
    """Joins the store and the guards: what is kept is hidden, and the other way round.

    Args:
        store: keeps the requests.
        policy: hides their targets.
        fixed: ids of targets of the guard file, which are not the store's.
        telemetry: counts.
        changed: called whenever targets may have come or gone: to note it in the log. What it raises is told by ``behind``.
        clock: what time it is.

    Attributes:
        open: ids of targets that are to be hidden and that no guard can take in.
        behind: kind of the error that kept guards or log from following the store at the last look; empty: none did.
    """

    def __init__(
        self,
        store: TargetStore,
        policy: Policy,
        fixed: Sequence[str],
        telemetry: Telemetry,
        *,
        changed: Callable[[], object] = lambda: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store, self.policy, self.fixed, self.telemetry = store, policy, frozenset(fixed), telemetry
        self._changed, self._clock = changed, clock
        self.open: frozenset[str] = frozenset()
        self.behind = ""
        self._lock = asyncio.Lock()

    async def follow(self) -> int:
        """Bring the guards in line with the store: what other processes have added or ended, and what has expired."""
        await self.in_line()
        return len(self.policy.targets)

    async def in_line(self) -> list[Target]:
        """:meth:`follow`; what the store says is hidden at that very moment, whether or not a guard could take it in."""
        async with self._lock:
            active = await self._follow()
            await asyncio.to_thread(self._changed)
            return list(active.values())

    async def _follow(self) -> dict[str, Target]:
        active = {t.id: t for t in await asyncio.to_thread(self.store.active)}
        now = self._clock()
        for target in [t for t in active.values() if t.until is not None and _aware(t.until) <= now]:
            await asyncio.to_thread(self.store.end, target.id, "expired")
            del active[target.id]
        held = set(self.policy.targets) - self.fixed
        for name in held - set(active):
            await asyncio.to_thread(self.policy.drop, name)
        failed = set()
        for name in set(active) - held:
            try:
                await asyncio.to_thread(self.policy.add, active[name])
            except Exception:  # one that a guard cannot take in must not keep the others out; it is told by /ready
                failed.add(name)
        self.open = frozenset(failed)
        self._count()
        return active

    async def keep_up(self, seconds: float) -> None:
        """Follow the store until cancelled. What is hidden stays hidden where the store does not answer."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.follow()
            except Exception as error:  # whatever a database raises, the next look may go well
                self.behind = type(error).__name__
            else:
                self.behind = ""

    async def _noted(self) -> None:
        """Have the log note a change that is kept and acknowledged; if it cannot now, the next look or request does."""
        try:
            await asyncio.to_thread(self._changed)
        except Exception as error:  # the change holds all the same
            self.behind = type(error).__name__

    def _count(self) -> None:
        self.telemetry.targets.set(len(self.policy.targets))
        self.telemetry.unhidden.set(len(self.open))

    async def add(self, key: str | None, target: Target, reason: str) -> Entry:
        """Keep a request and hide its target: both are done when this returns.

        Raises:
            Refused: the target hides nothing or nearly everything, has expired, the key belongs to another request, or nothing
                can be kept now.
        """
        target = named(target)
        digest = hashlib.sha256(
            json.dumps([target.model_dump(mode="json", exclude={"id"}), reason], sort_keys=True).encode()
        ).hexdigest()
        try:
            self.policy.check(target)
        except InputError as error:
            raise Refused(422, f"{error.message} {error.remedy}".strip()) from None
        if target.until is not None and _aware(target.until) <= self._clock():
            raise Refused(422, "The target has expired before it began.", "until")
        async with self._lock:
            try:
                entry = await asyncio.to_thread(self.store.add, key, digest, target, reason)
            except Conflict:
                raise Refused(409, "This idempotency key was used for another request.", "Idempotency-Key") from None
            except Unkept as unkept:
                raise unkept.refused() from None
            if entry.new:
                try:
                    await asyncio.to_thread(self.policy.add, target)
                except Exception as error:  # kept and not hidden it must not be
                    with suppress(Unkept):  # then /ready tells of it
                        await asyncio.to_thread(self.store.end, entry.id, "withdrawn")
                    if isinstance(error, InputError):
                        raise Refused(422, error.message) from None
                    raise
                await self._noted()
            self._count()
            return entry

    async def withdraw(self, target: str) -> Entry:
        """End a request: its target is hidden no more when this returns.

        Raises:
            Refused: there is no such request, or nothing can be kept now: then it is still hidden.
        """
        async with self._lock:
            try:
                entry = await asyncio.to_thread(self.store.end, target, "withdrawn")
            except Unkept as unkept:
                raise unkept.refused() from None
            if entry is None:
                raise Refused(404, "There is no such request.")
            await asyncio.to_thread(self.policy.drop, target)
            await self._noted()
            self._count()
            return entry


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
