"""Work that goes on beside a server: following the registry, and jobs on a schedule."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from expunge.core.errors import ExpungeError
from expunge.guards.target import Target
from expunge.ledger.registry import Registry


class Scheduled:
    """Calls something now and again, in a thread of its own, until it is stopped. What it raises stops nothing.

    Args:
        job: what is called.
        seconds: between the end of a call and the next.
        jitter: share by which this varies at random: who is watched must not know when.
        at_once: call it when it is started, not only after the first pause.
    """

    def __init__(self, job: Callable[[], object], seconds: float, *, jitter: float = 0.0, at_once: bool = True) -> None:
        self._job, self._seconds, self._jitter, self._at_once = job, seconds, jitter, at_once
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._last = time.monotonic()
        self.failing = ""  #: what the last call raised: the words of an error of Expunge, of others the class; empty: nothing

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a call that is under way is waited for."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def age(self) -> float:
        """Seconds since a call went well, or since this was made."""
        return time.monotonic() - self._last

    def _run(self) -> None:
        if not self._at_once and self._over.wait(self._pause()):
            return
        while True:
            try:
                self._job()
            except Exception as error:  # a job of somebody's own may raise anything, and the next call may go well
                self.failing = str(error) if isinstance(error, ExpungeError) else type(error).__name__
            else:
                self.failing, self._last = "", time.monotonic()
            if self._over.wait(self._pause()):
                return

    def _pause(self) -> float:
        return self._seconds * (1 + self._jitter * random.SystemRandom().uniform(-1, 1))


class Mirror:
    """What is to be hidden now, held in memory and brought up to date by what has changed: no target is decrypted twice.

    Args:
        registry: of which.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry, self._lock = registry, threading.Lock()
        targets, self.seq = registry.snapshot()
        self._held = {t.id: t for t in targets}

    def active(self) -> list[Target]:
        """As :meth:`Registry.active`; targets whose time is over are ended first.

        Raises:
            LedgerFailed: the registry does not answer.
        """
        with self._lock:
            self._registry.expire()
            while changes := self._registry.changes_since(self.seq):
                for change in changes:
                    if change.target is None:
                        self._held.pop(change.id, None)
                    else:
                        self._held[change.id] = change.target
                    self.seq = change.seq
            return list(self._held.values())


class Follower:
    """Tells guards of targets that come and go in a registry, whichever process has asked for them.

    ::

        targets, seq = registry.snapshot()
        policy = Policy(rows, Material(targets=targets, key=registry.guard_key, ...))
        follower = Follower(registry, seq, policy.add, policy.drop)
        follower.start()

    A process that has asked for a target itself calls :meth:`poll` and then has it hidden at once.

    Args:
        registry: that is followed.
        seq: last entry that the guards know.
        add: hides a target more.
        drop: hides one no more.
        changed: called after changes: to note the policy in the log.
        interval: seconds between two looks; a target of another process is hidden after at most so long.
    """

    def __init__(
        self,
        registry: Registry,
        seq: int,
        add: Callable[[Target], object],
        drop: Callable[[str], object],
        *,
        changed: Callable[[], object] = lambda: None,
        interval: float = 0.25,
    ) -> None:
        self._registry, self._seq, self._add, self._drop, self._changed = registry, seq, add, drop, changed
        self._lock = threading.Lock()
        self._schedule = Scheduled(self.poll, interval)
        self._untold = False
        self.refused: dict[str, str] = {}  #: active targets that the guards could not take in, with the kind of the error

    def start(self) -> None:
        """Follow in a thread."""
        self._schedule.start()

    def stop(self) -> None:
        """Follow no longer."""
        self._schedule.stop()

    @property
    def age(self) -> float:
        """Seconds since the registry was last seen: who serves with an old list is not ready."""
        return self._schedule.age

    @property
    def failing(self) -> str:
        """Why the registry is not seen at present; empty: it is."""
        return self._schedule.failing

    @property
    def seq(self) -> int:
        """Number of the last entry that the guards know."""
        return self._seq

    def poll(self) -> int:
        """Apply all changes that there are, and end targets whose time is over; how many changes.

        Raises:
            LedgerFailed: the registry does not answer.
        """
        with self._lock:
            self._registry.expire()
            count = 0
            while changes := self._registry.changes_since(self._seq):
                for change in changes:
                    self._apply(change.id, change.target)
                    self._seq = change.seq
                count += len(changes)
            if count or self._untold:
                self._untold = True
                self._changed()
                self._untold = False
            return count

    def _apply(self, target: str, words: Target | None) -> None:
        if words is None:
            self.refused.pop(target, None)
            self._drop(target)
            return
        try:
            self._add(words)
        except Exception as error:  # one that a detector cannot take in must not keep the others out
            self.refused[target] = type(error).__name__
