"""Putting a server together and running it."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.adapter import GuardedAdapter
from expunge.guards.guarded import Guarded
from expunge.guards.parts import Material
from expunge.guards.policy import Policy
from expunge.ledger.canaries import CanarySettings
from expunge.ledger.canonical import now
from expunge.serving.access import Access
from expunge.serving.answering import Answering
from expunge.serving.app import make_app
from expunge.serving.backends import Backend, LocalBackend, UpstreamBackend
from expunge.serving.canary import Rounds
from expunge.serving.config import Guards, Limits
from expunge.serving.kept import LoggedRequests, RegistryStore, State
from expunge.serving.ledger import Ledger, NoLedger
from expunge.serving.parts import Parts
from expunge.serving.store import MemoryStore, Requests, TargetStore
from expunge.serving.telemetry import Telemetry

if TYPE_CHECKING:
    from expunge.adapters.language import LanguageAdapter

UPSTREAM_KEY = "EXPUNGE_UPSTREAM_KEY"


@dataclass(frozen=True)
class Served:
    """What a server is made of.

    Attributes:
        app: the application.
        policy: its guards.
        name: of the model, as clients call it.
    """

    app: FastAPI
    policy: Policy
    name: str


def texts_of(source: str, columns: Mapping[str, str]) -> list[str]:
    """Prompts of a file or a named data set; of plain text the text."""
    return [r.prompt or r.answer for r in records_of(source, columns)]


def records_of(source: str, columns: Mapping[str, str]) -> list[Record]:
    """Records of a file or a named data set."""
    from expunge.pipeline.models import load_set

    return list(load_set(source, "prompts", dict(columns)))


def material(guards: Guards, key: bytes, adapter: LanguageAdapter | None) -> Material:
    """What the guards of a file are fitted on.

    Raises:
        InputError: a file of it is not there or is no data.
    """
    ordinary = texts_of(guards.ordinary, guards.columns) if guards.ordinary else []
    probes = {k: records_of(v, guards.columns) for k, v in guards.probes.items()}
    return Material(targets=guards.targets, ordinary=ordinary, key=key, adapter=adapter, probes=probes)


def assemble(
    guards: Guards,
    *,
    key: bytes,
    adapter: LanguageAdapter | None = None,
    upstream: str | None = None,
    name: str = "expunge",
    access: Access | None = None,
    limits: Limits | None = None,
    store: TargetStore | None = None,
    ledger: Ledger | None = None,
    state: State | None = None,
    canaries: CanarySettings | None = None,
    tell: bool = True,
) -> Served:
    """A server of a model, or before another server.

    Args:
        guards: and targets that are hidden from the start.
        key: secret of the guards.
        adapter: the model ...
        upstream: ... or the address of a server.
        name: how clients call it.
        access: who may do what.
        limits: what one client may ask for.
        store: keeps forget requests; none: the state's, or none that lasts.
        ledger: keeps records; none: the state's, or none.
        state: what is kept on the disk; none: nothing is.
        canaries: how the server tries itself out; none: not at all.
        tell: whether clients learn that a guard has spoken.

    Raises:
        InputError: neither or both, or guards that do not fit.
    """
    if (adapter is None) == (upstream is None):
        raise InputError("A server needs a model, or another server behind it.", "Give one of --model and --upstream.")
    if isinstance(adapter, GuardedAdapter):
        raise InputError(
            "This run is a guard itself; what it stands before is served with a guard file.", "Give --model its model."
        )
    limits, telemetry = limits or Limits(), Telemetry()
    policy = Policy(guards.guards, material(guards, key, adapter))
    backend: Backend
    if adapter is not None:
        backend = LocalBackend(
            Guarded(adapter, policy), name, batch=limits.batch, waiting=limits.waiting, observed=telemetry.batches.observe
        )
    else:
        assert upstream is not None
        check_url(upstream)
        backend = UpstreamBackend(upstream.rstrip("/"), name, os.environ.get(UPSTREAM_KEY), limits.seconds)
    if state is not None:
        store, ledger = store or RegistryStore(state.registry), ledger or LoggedRequests(state.log)
    ledger = ledger or NoLedger()
    ledger.of(policy)
    requests = Requests(
        store or MemoryStore(), policy, [t.id for t in guards.targets], telemetry, changed=ledger.note,
        clock=state.clock if state is not None else now,
    )  # fmt: skip
    answering = Answering(policy, backend, ledger, telemetry, seconds=limits.seconds, tell=tell)
    parts = Parts(policy, backend, answering, requests, telemetry, access or Access(None), limits, key)
    if canaries is not None:
        if state is None:
            raise InputError("Canaries need a log for what they find.", "Give --state FOLDER, or leave them out.")
        retain = texts_of(guards.retain, guards.columns) if guards.retain else []
        parts.canaries = Rounds(
            parts, state.log, state.registry, state.keys, canaries, fixed=guards.targets, retain=retain
        )  # fmt: skip
    return Served(make_app(parts), policy, name)


def check_url(url: str) -> None:
    """Refuse what is no address of a server.

    Raises:
        InputError: it is not ``http(s)://HOST...``, or holds a password.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is no address of a server.", "Write http://HOST:PORT/v1.")
    if parts.username or parts.password:
        raise InputError("The address of the server behind this one holds a password.", f"Set {UPSTREAM_KEY} instead.")


def check_open(host: str, access: Access) -> None:
    """Refuse to be open to others without keys.

    Raises:
        InputError: ``host`` is no loopback address, and everybody may do everything.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if access.open and not local:
        raise InputError(f"Without keys the server listens on this machine alone, not on {host!r}.", "Give --keys FILE.")


def run(served: Served, host: str, port: int, *, seconds: float = 30.0, log_level: str = "warning") -> None:
    """Serve until the process is told to end; answers that have begun are finished, for at most ``seconds``."""
    config = uvicorn.Config(
        served.app, host=host, port=port, log_level=log_level, access_log=False, timeout_graceful_shutdown=int(seconds),
        server_header=False, lifespan="on",
    )  # fmt: skip
    before = signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # the signal comes again after the end: what is kept is to be closed then
    try:
        uvicorn.Server(config).run()
    finally:
        signal.signal(signal.SIGTERM, before)
