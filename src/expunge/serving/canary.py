"""Canaries of a running server: secret questions that it puts to itself, on a schedule, through the way of any request."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import Counter as Counts
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from expunge.guards.calibration import apart
from expunge.guards.conversation import Conversation
from expunge.guards.target import Target
from expunge.ledger.canaries import Canaries, CanarySettings, Outcome
from expunge.ledger.following import Scheduled
from expunge.ledger.keys import KeyStore
from expunge.ledger.log import AuditLog
from expunge.ledger.probes import Reply
from expunge.ledger.registry import Registry
from expunge.serving.access import PROBING
from expunge.serving.parts import Parts
from expunge.serving.route_answers import prepared
from expunge.serving.schema import ChatRequest

T = TypeVar("T")

_VARIED = 0.2  #: share by which the time between two rounds varies: nobody is to know when the next one is
_LATE = 2.0  #: times the interval, and ...
_ROUND = 60.0  #: ... seconds for a round itself: if none went well for so long, one is overdue

_log = logging.getLogger("expunge.canaries")


class CanariesFailed(Exception):
    """None of a round's questions was answered: the guard was not tried."""


class Metrics:
    """What canaries have found, for Prometheus; no label holds a target.

    Args:
        registry: of the server's metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.probes = Counter("expunge_canary_probes", "Questions of canaries", ["kind", "result"], registry=registry)
        self.rounds = Counter("expunge_canary_rounds", "Rounds of canaries that were ended and logged", registry=registry)
        self.failing = Gauge(
            "expunge_canary_failing", "Targets that a canary got at when they were last tried", registry=registry
        )
        self.overdue = Gauge(
            "expunge_canary_overdue", "1: no round of canaries went well for twice the interval and a minute", registry=registry
        )
        self.last = Gauge("expunge_canary_last_timestamp_seconds", "When the last round of canaries ended", registry=registry)
        self.refused = Gauge(
            "expunge_canary_refused_ratio",
            "Share of ordinary questions that a guard acted on in the last round",
            registry=registry,
        )


class Rounds:
    """Tries out a server from within.

    Args:
        parts: of the server.
        log: where results are written.
        registry: holds what is hidden, and the keys of probes.
        keys: hold the key of all other probes.
        settings: how often and how many.
        fixed: targets of the guard file.
        retain: questions that must be answered.

    Raises:
        InputError: a question that must be answered is one that thresholds were set by.
    """

    def __init__(
        self,
        parts: Parts,
        log: AuditLog,
        registry: Registry,
        keys: KeyStore,
        settings: CanarySettings,
        *,
        fixed: Sequence[Target] = (),
        retain: Sequence[str] = (),
    ) -> None:
        apart(parts.policy.material.ordinary, retain, "of canaries")
        adapter = parts.policy.material.adapter
        if settings.one_turn is None:  # of a server behind this one nothing is known: it is asked as a chat
            settings = settings.model_copy(update={"one_turn": adapter is not None and not adapter.templated})
        own, held = keys.make("canaries"), {t.id for t in fixed}
        self.settings, self._parts, self._fixed = settings, parts, list(fixed)
        self._canaries = Canaries(
            self._targets, self._ask, log, own, settings=settings, retain=retain,
            key_of=lambda target: own if target in held else registry.probe_key(target),
        )  # fmt: skip
        self._metrics = Metrics(parts.telemetry.registry)
        self._metrics.overdue.set_function(lambda: float(self.overdue))
        self._schedule = Scheduled(self.round, settings.every, jitter=_VARIED)
        self._failing: dict[str, bool] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: Future[Any] | None = None
        self._over = threading.Event()

    @property
    def failing(self) -> int:
        """Targets that a canary got at when they were last tried."""
        return sum(self._failing.values())

    @property
    def overdue(self) -> bool:
        """Whether no round went well for twice the interval and a minute."""
        return self._schedule.age > _LATE * self.settings.every + _ROUND

    def start(self) -> None:
        """Begin, from within the server's event loop; the first round comes at once."""
        self._loop = asyncio.get_running_loop()
        self._canaries.announce()
        self._schedule.start()

    async def stop(self) -> None:
        """End; the question that is under way is given up, and what the round has found so far is logged."""
        self._over.set()
        self._canaries.stop()
        if self._asking is not None:
            self._asking.cancel()
        await asyncio.to_thread(self._schedule.stop)

    def round(self) -> list[Outcome]:
        """Ask once; the schedule calls it.

        Raises:
            LedgerFailed: the log cannot be written, or the registry does not answer.
            CanariesFailed: no question was answered.
        """
        try:
            done = self._canaries.round()
        except Exception as error:
            if self._over.is_set():
                return []
            _log.warning("Canaries: a round could not be ended and logged (%s).", type(error).__name__)
            raise
        if self._over.is_set():
            return done
        self._told(done)
        if done and all(o.result == "error" for o in done):
            raise CanariesFailed
        return done

    def _told(self, done: Sequence[Outcome]) -> None:
        tried: dict[str, bool] = {}
        for o in done:
            self._metrics.probes.labels(o.probe.kind, o.result).inc()
            if o.result != "error":  # nothing was shown, for better or worse
                tried[o.probe.target] = tried.get(o.probe.target, False) or o.result == "fail"
        hidden = {*self._parts.policy.targets, *self._parts.requests.open}
        self._failing = {k: v for k, v in {**self._failing, **tried}.items() if k in hidden}
        self._metrics.failing.set(self.failing)
        self._metrics.rounds.inc()
        self._metrics.last.set_to_current_time()
        refused = self._canaries.refused
        if refused.n:
            self._metrics.refused.set(refused.k / refused.n)
        counts = Counts(o.result for o in done)
        kinds = ", ".join(sorted({o.probe.kind for o in done if o.result == "fail"}))
        level = logging.WARNING if counts["fail"] or counts["error"] else logging.INFO
        _log.log(
            level, "Canaries: of %d questions %d held, %d got through%s, %d had no answer; %d targets fail.",
            len(done), counts["pass"], counts["fail"], f" ({kinds})" if kinds else "", counts["error"], self.failing,
        )  # fmt: skip

    def _targets(self) -> list[Target]:
        """What is hidden at this moment, once the guards have been brought in line with the registry."""
        return [*self._fixed, *self._waited(self._parts.requests.in_line())]

    def _ask(self, conversation: Conversation) -> Reply:
        return self._waited(self._asked(conversation))

    async def _asked(self, conversation: Conversation) -> Reply:
        turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
        body = ChatRequest.model_validate({"messages": turns, "temperature": 0, "max_tokens": self.settings.tokens})
        asked = prepared(self._parts, body, PROBING)
        plan, text = await self._parts.answering.probed(asked, stream=bool(secrets.randbelow(2)))
        return Reply(text, acted=bool(plan.fired))

    def _waited(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that the server's event loop does."""
        assert self._loop is not None
        if self._over.is_set():
            work.close()
            raise CanariesFailed
        asking: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._asking = asking
        if self._over.is_set():  # it was stopped just now, and has not seen this one
            asking.cancel()
        return asking.result()
