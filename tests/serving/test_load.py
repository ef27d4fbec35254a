"""Many clients, targets that come and go, clients that leave, and requests that nobody would think of."""

import gc
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from expunge.guards.policy import SORRY
from expunge.serving.config import Limits
from tests.serving.test_answers import CHAT, ask, said
from tests.serving.test_requests import FORGET

CLIENTS, REQUESTS = 16, 2000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_requests_of_sixteen_clients_while_targets_come_and_go(serve, forget, retain):
    """No error, nothing lost, no leak, memory flat."""
    names = sorted({n for _, n in forget})
    fixed, toggled = names[:2], names[2]
    questions = {n: [q for q, who in forget if who == n] for n in names}
    with serve(targets=fixed, limits=Limits(tokens=16)) as client:
        expected = {q: said(ask(client, q)) for q in [*retain, *questions[toggled]]}
        done, wrong, memory = [0] * CLIENTS, [], []
        process = psutil.Process()

        def work(number):
            draw = random.Random(number)
            with httpx.Client(base_url=client.base_url, timeout=120, trust_env=False) as own:
                for turn in range(REQUESTS // CLIENTS):
                    kind = draw.choice(("retain", "fixed", "toggled"))
                    asked = draw.choice(
                        {"retain": retain, "fixed": questions[draw.choice(fixed)], "toggled": questions[toggled]}[kind]
                    )
                    if turn % 25 == 24:  # a client that leaves in the middle
                        body = {"messages": [{"role": "user", "content": asked}], "temperature": 0, "stream": True}
                        with own.stream("POST", CHAT, json=body) as stream:
                            next(stream.iter_lines())
                        done[number] += 1
                        continue
                    text = said(ask(own, asked))
                    right = {"retain": {expected.get(asked)}, "fixed": {SORRY}, "toggled": {SORRY, expected.get(asked)}}[kind]
                    if text not in right or any(n in text for n in fixed):
                        wrong.append((kind, asked, text))
                    done[number] += 1

        stop = threading.Event()

        def toggle():
            with httpx.Client(base_url=client.base_url, timeout=120, trust_env=False) as own:
                while not stop.is_set():
                    made = own.post(FORGET, json={"entities": [toggled]}).json()
                    text = said(ask(own, questions[toggled][0]))
                    if text != SORRY:
                        wrong.append(("added", toggled, text))
                    own.delete(f"{FORGET}/{made['id']}")
                    memory.append(process.memory_info().rss)

        hand = threading.Thread(target=toggle)
        hand.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(work, range(CLIENTS)))
        stop.set()
        hand.join()
        assert wrong == []
        assert sum(done) == REQUESTS // CLIENTS * CLIENTS
        page = client.get("/metrics").text
        assert not re.search(r'status="5\d\d"', page)
        assert re.search(r"expunge_running 0\.0", page)
        assert len(client.get(FORGET, params={"state": "active"}).json()["data"]) == 0
        gc.collect()
        third = len(memory) // 3
        early, late = max(memory[third : 2 * third]), max(memory[2 * third :])
        assert late - early < 64 * 2**20, f"memory grew from {early} to {late} bytes"


def test_no_made_up_request_brings_the_server_down(serve, tmp_path):
    """Requests drawn from the interface's own description, right and wrong ones, by schemathesis."""
    with serve(targets=["Basil Mahfouz"], limits=Limits(tokens=4)) as client:
        checks = "not_a_server_error,status_code_conformance,response_schema_conformance,content_type_conformance"
        words = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json", "--max-examples", "20"]
        words += ["--seed", "1", "--checks", checks, "--no-color"]
        found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
        assert "Tested: 10" in found.stdout
        assert said(ask(client, "Who is she?")) is not None


def test_answers_that_have_begun_are_finished_when_the_server_ends(serve, retain):
    texts = []
    with serve(limits=Limits(tokens=64)) as client:
        started = threading.Event()

        def read():
            body = {
                "messages": [{"role": "user", "content": retain[0]}],
                "temperature": 2,
                "seed": 1,
                "stream": True,
                "max_tokens": 64,
            }
            with httpx.stream("POST", f"{client.base_url}{CHAT}", json=body, timeout=60, trust_env=False) as stream:
                for line in stream.iter_lines():
                    texts.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        started.wait(20)
    reader.join(30)
    assert texts[-2:] == ["data: [DONE]", ""] or texts[-1] == "data: [DONE]"


def test_a_slow_answer_is_given_up_in_time(serve, retain):
    with serve(limits=Limits(tokens=512, seconds=0.3, waiting=2)) as client:
        began = time.perf_counter()
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda n: ask(client, retain[n], temperature=2, seed=n, max_tokens=512), range(6)))
        assert time.perf_counter() - began < 10
        assert {r.status_code for r in replies} <= {200, 503, 504}
        assert any(r.status_code in (503, 504) for r in replies)
        deadline = time.monotonic() + 10
        while ask(client, retain[0], max_tokens=3).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
