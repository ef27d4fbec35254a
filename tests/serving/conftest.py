"""Real servers on the loopback interface, with the tiny model of people behind them."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from expunge.serving.access import Access, Role
from expunge.serving.config import Guards, Limits
from expunge.serving.server import assemble
from tests.guards.conftest import name_of

KEY = b"test key of the guards, 32 bytes"


@contextmanager
def running(app):
    """A server of an application in a thread; its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False, timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def forget(people):
    """Questions to forget, each with the name in it."""
    return [(r.prompt, name_of(r)) for r in people.split.forget]


@pytest.fixture(scope="session")
def retain(people):
    return [r.prompt for r in people.split.retain[:20]]


@pytest.fixture
def serve(target_adapter):
    """A function that runs a server with guards; as a context it gives a client of its address."""

    @contextmanager
    def make(guards="filter", targets=(), limits=None, access=None, file=None, **options):
        if "upstream" not in options:
            options["adapter"] = target_adapter
        held = Guards(guards=guards, targets=[{"entities": [t]} if isinstance(t, str) else t for t in targets], **(file or {}))
        served = assemble(held, key=KEY, name="tiny", limits=limits or Limits(tokens=24), access=access, **options)
        with running(served.app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            client.served = served
            yield client

    return make


@pytest.fixture
def keys(tmp_path):
    """A key file with one client who may ask and one who may administer; their keys."""
    from expunge.serving.access import add_key

    path = tmp_path / "keys.yaml"
    asks, administers = add_key(path, "alice", [Role.ASK]), add_key(path, "operator", [Role.ADMINISTER])
    return Access.read(path), asks, administers, path
