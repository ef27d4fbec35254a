"""How long it takes from the answer to a forget request until the target is hidden: at most a second, whatever goes on."""

import statistics
import threading
import time

import httpx
import pytest

from expunge.guards.policy import SORRY
from expunge.guards.target import Target
from expunge.ledger.places import Places
from expunge.ledger.registry import Registry
from expunge.ledger.verify import records
from tests.serving.conftest import running
from tests.serving.machine import Process
from tests.serving.test_answers import ask, said
from tests.serving.upstream import upstream_app

PRESENT, CLIENTS, ASKED = 1000, 16, 12


def seconds(one, name):
    """From the request to its acknowledgement, and from there to the first refusal."""
    began = time.monotonic()
    reply = one.forget(name)
    acknowledged = time.monotonic()
    assert reply.status_code == 201, reply.text
    while said(ask(one.client, f"Tell me of {name}.")) != SORRY:
        assert time.monotonic() - acknowledged < 5
    return acknowledged - began, time.monotonic() - acknowledged


@pytest.mark.slow
def test_a_target_is_active_within_a_second_among_a_thousand_and_under_sixteen_clients(tmp_path):
    state = tmp_path / "state"
    registry = Registry(state / "registry.db", Places(state).store())
    for at in range(PRESENT):
        registry.request(f"key-{at}", Target(entities=(f"Present Person{at}",)), "")
    registry.close()
    with (
        running(upstream_app({"Tell me of": "She was a painter."})) as url,
        Process(tmp_path / "a", ("--upstream", f"{url}/v1", "--state", state, "--canaries", "2s")) as one,
    ):
        assert one.client.get("/ready").json()["targets"] == PRESENT
        quiet = [seconds(one, f"Quiet Person{at}") for at in range(ASKED)]
        over, done = threading.Event(), [0] * CLIENTS

        def busy(number):
            with httpx.Client(base_url=one.client.base_url, timeout=60, trust_env=False) as own:
                while not over.is_set():
                    text = said(ask(own, f"Tell me of Present Person{number}." if done[number] % 2 else "Tell me of the sea."))
                    assert (text == SORRY) is bool(done[number] % 2)
                    done[number] += 1

        crowd = [threading.Thread(target=busy, args=(n,)) for n in range(CLIENTS)]
        for member in crowd:
            member.start()
        loaded = [seconds(one, f"Late Person{at}") for at in range(ASKED)]
        over.set()
        for member in crowd:
            member.join()
        assert min(done) > 0
        end = time.monotonic() + 60
        while one.metric("expunge_canary_rounds_total") < 1:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert one.metric("expunge_canary_failing") == 0
        assert one.end() < 15, "a round that is under way is broken off"
        assert [r["kind"] for _, r in records(state / "log")][-1] == "stop"
        for found, name in ((quiet, "alone"), (loaded, f"with {CLIENTS} clients ({sum(done)} answers)")):
            asked, active = zip(*found, strict=True)
            print(f"{name}: acknowledged after {statistics.median(asked):.3f} s (at most {max(asked):.3f}),",
                  f"refused {statistics.median(active):.3f} s later (at most {max(active):.3f})")  # fmt: skip
            assert max(active) < 1.0
            assert max(asked) < 5.0
