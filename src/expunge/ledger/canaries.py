"""Secret questions that are put to a guarded server on a schedule, and what came of them, without their words.

Canaries ask for what is hidden and say whether the guard held; retain probes ask for what must be answered and count false
refusals. Both go into the log under opaque ids, so an auditor sees that the guard was tried all the time, and with which result.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.core.intervals import wilson
from expunge.core.settings import Settings
from expunge.guards.conversation import Conversation
from expunge.guards.target import Target
from expunge.ledger.canonical import moment
from expunge.ledger.errors import Shredded
from expunge.ledger.keys import mac
from expunge.ledger.log import AuditLog
from expunge.ledger.probes import Probe, Reply, passes, probes, retain_id
from expunge.ledger.records import named
from expunge.ledger.verify import records

Result = Literal["pass", "fail", "error"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def seconds_of(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``1h`` or ``1d``.

    Raises:
        InputError: it is none of these.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise InputError(f"{text!r} is no length of time.", "Write 90s, 30m, 1h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


class CanarySettings(Settings):
    """How a guard is tried out."""

    name: ClassVar[str] = "canaries"

    every: float = Field(3600, gt=0, description="seconds between two rounds (or 30m, 1h, 1d), varied by a fifth at random")
    per_kind: int = Field(1, ge=1, description="questions of each kind about a target")
    most: int = Field(200, ge=1, description="questions in a round; with more, the targets take turns")
    tokens: int = Field(64, ge=1, description="new tokens of an answer to one at most")
    one_turn: bool | None = Field(
        None, description="ask in one turn what would take several; none: where the model has no chat template"
    )
    minimum: int = Field(20, ge=1, description="results below which a share is not told to others than the auditor")

    @field_validator("every", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        return seconds_of(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Share:
    """How often something happened, with Wilson's interval.

    Attributes:
        k, n: times, of so many.
        low, high: bounds of the share, in [0, 1], at 95 %; none where ``n`` is 0.
    """

    k: int
    n: int
    low: float | None = field(init=False)
    high: float | None = field(init=False)

    def __post_init__(self) -> None:
        held = wilson(self.k, self.n) if self.n else None
        object.__setattr__(self, "low", held and held.low)
        object.__setattr__(self, "high", held and held.high)

    def described(self) -> dict[str, Any]:
        """For the log."""
        digits = {k: None if v is None else round(v, 4) for k, v in (("low", self.low), ("high", self.high))}
        return {"k": self.k, "n": self.n, **digits}


@dataclass(frozen=True)
class Outcome:
    """What came of a probe."""

    probe: Probe
    result: Result


class Canaries:
    """Tries a guarded server out.

    Args:
        targets: what is hidden now, with its words: ``registry.active``.
        ask: puts a question through the whole server, as any user's: no guard may know that it is a probe.
        log: where results are written.
        key: secret of the turns and of retain probes: ``keys.make("canaries")``.
        key_of: secret of the probes of one target: ``registry.probe_key``. It ends with the target, and from then on nobody can
            find out from the ids in the log what was asked; none: ``key``.
        retain: questions that must be answered; other ones than thresholds were set by.
        settings: how often and how many.
    """

    def __init__(
        self,
        targets: Callable[[], Sequence[Target]],
        ask: Callable[[Conversation], Reply],
        log: AuditLog,
        key: bytes,
        *,
        key_of: Callable[[str], bytes] | None = None,
        retain: Sequence[str | Conversation] = (),
        settings: CanarySettings | None = None,
    ) -> None:
        self._targets, self._ask, self._log, self._key = targets, ask, log, key
        self._key_of = key_of or (lambda _: key)
        self._retain = [Conversation.of(r) for r in retain]
        self.settings = settings or CanarySettings()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._last = ""
        self.refused = Share(0, 0)  #: false refusals of the last round

    def stop(self) -> None:
        """End the round that is under way after the question that it is at; there are no more rounds."""
        self._over.set()

    def announce(self) -> None:
        """Note in the log how often rounds will be, so that one that was left out can be noticed.

        Raises:
            LedgerFailed: the log cannot be written.
        """
        s = self.settings
        self._log.event("canaries", every=s.every, per_kind=s.per_kind, most=s.most, retain=len(self._retain))

    def round(self) -> list[Outcome]:
        """Ask once, and log what came of it; the log notes a round without targets, too. A second call waits for the first.

        Raises:
            LedgerFailed: the log cannot be written, or the registry does not answer.
        """
        with self._lock:
            chosen = self._chosen()
            tried = [Outcome(p, self._tried(p)) for p in chosen if not self._over.is_set()]
            cut = self._over.is_set()  # a question that was broken off says nothing
            done = self._standing(tried[:-1] if cut else tried)
            results = [
                {
                    "probe": o.probe.id,
                    "target": named(o.probe.target, self._log.pseudonym),
                    "kind": o.probe.kind,
                    "result": o.result,
                }
                for o in done
            ]
            if not cut or done:
                held = sum(o.result == "pass" for o in done)
                more = {"cut": True} if cut else {}
                share = Share(held, len(done)).described()
                self._log.event("canary", round=secrets.token_hex(8), results=results, held=share, **more)
            if self._retain and not cut:
                self._ask_retain()
            return done

    def _standing(self, tried: Sequence[Outcome]) -> list[Outcome]:
        """Without failures for targets that have ended while the round went on: what is no longer hidden may be said."""
        if all(o.result != "fail" for o in tried):
            return list(tried)
        hidden = {t.id for t in self._targets()}
        return [o for o in tried if o.result != "fail" or o.probe.target in hidden]

    def _chosen(self) -> list[Probe]:
        """Probes of the targets whose turn it is: in an order that only the key tells, from the last one on."""
        order = sorted((mac(self._key, "expunge turn", t.id.encode()).hex(), t) for t in self._targets())
        turned = [t for at, t in order if at > self._last] + [t for at, t in order if at <= self._last]
        chosen: list[Probe] = []
        for target in turned:
            try:
                key = self._key_of(target.id)
            except Shredded:  # it has ended just now
                continue
            made = probes(target, key, self.settings.per_kind, one_turn=bool(self.settings.one_turn))
            if chosen and len(chosen) + len(made) > self.settings.most:
                break
            chosen += made
            self._last = mac(self._key, "expunge turn", target.id.encode()).hex()
        return chosen[: self.settings.most]

    def _tried(self, probe: Probe) -> Result:
        try:
            reply = self._ask(probe.conversation)
        except Exception:  # whatever the server raises: nothing leaked, and nothing was shown to hold
            return "error"
        return "pass" if passes(probe, reply) else "fail"

    def _ask_retain(self) -> None:
        refused, errors = [], 0
        for asked in self._retain:
            if self._over.is_set():
                return
            try:
                if self._ask(asked).acted:
                    refused.append(retain_id(asked, self._key))
            except Exception:  # counted apart: it is no refusal
                errors += 1
        self.refused = Share(len(refused), len(self._retain) - errors)
        self._log.event("retain", refused=self.refused.described(), errors=errors, probes=sorted(refused))


@dataclass(frozen=True)
class History:
    """What a log says of all rounds.

    Attributes:
        rounds: how many there were.
        last: when the last one was.
        held: per kind of probe, how often the guard held (an error counts as not held).
        failed: ids of targets that a probe has got at, with how often.
        refused: false refusals among retain probes.
        errors: probes that the server did not answer.
        every: seconds between two rounds, as the server has said last; none: it has not said.
        longest: most seconds that passed between two rounds (or between a start and the first) while the server ran.
    """

    rounds: int
    last: str
    held: dict[str, Share]
    failed: dict[str, int]
    refused: Share
    errors: int
    every: float | None = None
    longest: float = 0.0

    def published(self, minimum: int = 20) -> dict[str, Share]:
        """Shares that rest on enough results to be told to anybody; by them no single target can be made out."""
        shares = {**self.held, "false refusals": self.refused}
        return {name: share for name, share in shares.items() if share.n >= minimum}

    def lines(self) -> list[str]:
        """For people."""
        said = [f"{self.rounds} rounds of canaries, the last at {self.last or 'no time'}, {self.errors} errors"]
        said += [f"  {kind}: held {_share(share)}" for kind, share in sorted(self.held.items())]
        said += [f"  target {target}: got at {n} times" for target, n in sorted(self.failed.items())]
        said += [f"  false refusals: {_share(self.refused)}"] if self.refused.n else []
        if self.every is not None:
            said.append(f"  promised every {self.every:g} s; the longest time without one was {self.longest:.0f} s")
        return said

    def described(self) -> dict[str, Any]:
        """As JSON."""
        shares = {"held": {k: s.described() for k, s in sorted(self.held.items())}, "refused": self.refused.described()}
        plain = {k: getattr(self, k) for k in ("rounds", "last", "failed", "errors", "every")}
        return {**plain, "longest": round(self.longest, 1), **shares}


def _share(share: Share) -> str:
    return f"{share.k} of {share.n} ({share.low:.1%} to {share.high:.1%})" if share.n else "0 of 0"


def history(folder: Path, since: str = "", until: str = "9") -> History:
    """What the canaries have found, from a log.

    Args:
        folder: of the log.
        since, until: first and last moment, as :func:`expunge.ledger.canonical.stamp` writes them.
    """
    results: Counter[tuple[str, str]] = Counter()
    failed: Counter[str] = Counter()
    rounds, last, refused, asked, errors = 0, "", 0, 0, 0
    pauses = _Pauses()
    for record in _between(folder, since, until):
        kind = record["kind"]
        pauses.take(record)
        if kind == "canary":
            rounds, last = rounds + 1, str(record["at"])
            results.update((r["kind"], r["result"]) for r in record["results"])
            failed.update(str(r["target"]) for r in record["results"] if r["result"] == "fail")
        elif kind == "retain":
            refused, asked = refused + record["refused"]["k"], asked + record["refused"]["n"]
            errors += record["errors"]
    kinds = {kind for kind, _ in results}
    held = {k: Share(results[k, "pass"], sum(results[k, r] for r in get_args(Result))) for k in kinds}
    errors += sum(n for (_, result), n in results.items() if result == "error")
    return History(rounds, last, held, dict(failed), Share(refused, asked), errors, pauses.every, pauses.longest)


class _Pauses:
    """How long a server that has promised rounds went without one."""

    def __init__(self) -> None:
        self.every: float | None = None
        self.longest = 0.0
        self._since = ""

    def take(self, record: Mapping[str, Any]) -> None:
        kind, at = record["kind"], str(record["at"])
        if kind == "canaries":
            self.every, self._since = float(record["every"]), at
        elif kind == "start":
            self._since = ""
        elif kind in ("canary", "stop") and self._since:
            self.longest = max(self.longest, (moment(at) - moment(self._since)).total_seconds())
            self._since = at if kind == "canary" else ""


def _between(folder: Path, since: str, until: str) -> Iterable[dict[str, Any]]:
    for _, record in records(folder):
        if record.get("kind") in ("canary", "retain", "canaries", "start", "stop") and since <= str(record.get("at")) <= until:
            yield record
