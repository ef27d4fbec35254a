"""``expunge serve``, ``expunge key`` and ``expunge guards`` as a newcomer uses them: real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import NamedTuple

import httpx
import pytest

from expunge.cli.main import main
from expunge.guards.policy import SORRY
from tests.serving.test_answers import ask, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory, target_adapter, forget):
    """A model folder, a guard file and a key."""
    place = tmp_path_factory.mktemp("serve")
    target_adapter.save(place / "model")
    (place / "guards.yaml").write_text(f"guards: [filter]\ntargets:\n  - entities: [{forget[0][1]}]\n")
    (place / "guard.key").write_text("0123456789abcdef0123456789abcdef")
    (place / "guard.key").chmod(0o600)
    return place


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def command(*words, cwd, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("EXPUNGE_GUARD_KEY", None)
    return [sys.executable, "-m", "expunge", *map(str, words)], {"cwd": cwd, "env": environment, "text": True, **more}


class Done(NamedTuple):
    """What a command has said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capfd, monkeypatch):
    """A function that runs a command in this process."""
    monkeypatch.delenv("EXPUNGE_GUARD_KEY", raising=False)

    def made(*words, cwd):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        code = main(list(map(str, words)))
        return Done(code, *capfd.readouterr())

    return made


def begin(*words, cwd, port):
    line, options = command("serve", *words, "--port", port, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(line, **options)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
    end = time.monotonic() + 90
    while True:
        assert process.poll() is None, process.communicate()
        try:
            if client.get("/ready").status_code == 200:
                return process, client
        except httpx.HTTPError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_model_is_served_until_it_is_told_to_end(folder, forget, retain):
    port = free_port()
    words = ("--model", "model", "--guard", "guards.yaml", "--key", "guard.key", "--json", "tokens=24")
    process, client = begin(*words, cwd=folder, port=port)
    with closing(client):
        assert said(ask(client, forget[0][0])) == SORRY
        assert said(ask(client, retain[0])) not in ("", SORRY)
        body = {"messages": [{"role": "user", "content": retain[0]}], "stream": True, "temperature": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM, 143)
    first = json.loads(out.splitlines()[0])
    assert first == {"url": f"http://127.0.0.1:{port}", "model": "model", "guards": ["filter"], "targets": 1}
    assert forget[0][1] not in out + err
    assert "Traceback" not in err


def test_wrong_words_are_told_before_anything_starts(run, folder, tmp_path):
    good = ["--model", "model", "--guard", "guards.yaml", "--key", "guard.key"]
    (folder / "bad.yaml").write_text("guards: [fliter]\n")
    (folder / "open.key").write_text("0123456789abcdef")
    (folder / "open.key").chmod(0o644)
    for words, match in (
        (["--guard", "guards.yaml", "--key", "guard.key"], "a model, or another server"),
        ([*good, "--upstream", "http://127.0.0.1:1/v1"], "a model, or another server"),
        (["--model", "model", "--guard", "none.yaml", "--key", "guard.key"], "cannot be read"),
        (["--model", "model", "--guard", "bad.yaml", "--key", "guard.key"], "filter"),
        (["--model", "model", "--guard", "guards.yaml"], "no key"),
        (["--model", "model", "--guard", "guards.yaml", "--key", "open.key"], "Others may read"),
        (["--model", "nowhere", "--guard", "guards.yaml", "--key", "guard.key"], "nowhere"),
        ([*good, "--host", "0.0.0.0"], "Without keys"),
        ([*good, "tokenz=3"], "tokens"),
        ([*good, "--keys", "guards.yaml"], "key file"),
        (["--upstream", "nowhere", "--guard", "guards.yaml", "--key", "guard.key"], "no address"),
    ):
        done = run("serve", *words, "--check", cwd=folder)
        assert done.returncode == 2, (words, done.stderr)
        assert match in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert run("serve", *good, "--check", cwd=folder).returncode == 0


def test_keys_are_made_and_only_their_digests_kept(run, tmp_path):
    done = run("key", "alice", "--file", "keys.yaml", cwd=tmp_path)
    assert done.returncode == 0
    key = done.stdout.strip()
    assert key.startswith("xp-")
    both = json.loads(
        run("key", "op", "--role", "ask", "--role", "administer", "--file", "keys.yaml", "--json", cwd=tmp_path).stdout
    )
    text = (tmp_path / "keys.yaml").read_text()
    assert key not in text
    assert both["key"] not in text
    assert text.count("sha256") == 2
    wrong = run("key", "eve", "--role", "root", "--file", "keys.yaml", cwd=tmp_path)
    assert wrong.returncode == 2
    assert (tmp_path / "keys.yaml").read_text() == text


def test_guards_are_listed_and_shown(run, tmp_path):
    listed = json.loads(run("guards", "--json", cwd=tmp_path).stdout)["guards"]
    assert {"filter", "prompt"} <= {g["name"] for g in listed}
    shown = run("guards", "filter", cwd=tmp_path)
    assert "encodings" in shown.stdout
    assert "never forgotten" in shown.stdout
    parts = json.loads(run("guards", "--parts", "--json", cwd=tmp_path).stdout)
    assert {"terms", "always"} <= {p["name"] for p in parts["detectors"]}
    assert "refuse" in run("guards", "--parts", cwd=tmp_path).stdout
    assert "text" in run("guards", "refuse", cwd=tmp_path).stdout
    wrong = run("guards", "fliter", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "filter" in wrong.stderr


def test_what_was_acknowledged_survives_a_kill_and_can_be_verified(folder, tmp_path, forget, retain, run):
    """kill -9 while requests come in: every target that was acknowledged is hidden again, and the log holds for an auditor."""
    state, port = tmp_path / "state", free_port()
    (tmp_path / "guards.yaml").write_text("guards: [filter]\n")
    words = (
        "--model",
        folder / "model",
        "--guard",
        tmp_path / "guards.yaml",
        "--key",
        folder / "guard.key",
        "--state",
        state,
        "tokens=8",
    )
    names = sorted({n for _, n in forget})
    process, client = begin(*words, cwd=tmp_path, port=port)
    with closing(client):
        made = [
            client.post("/v1/expunge/requests", json={"entities": [n]}, headers={"idempotency-key": n.replace(" ", "-")})
            for n in names
        ]
        assert [r.status_code for r in made] == [201] * len(names)
        assert said(ask(client, forget[0][0])) == SORRY
        process.kill()
        process.wait()
    process, client = begin(*words, cwd=tmp_path, port=port)
    with closing(client):
        for question, _ in forget[::10]:
            assert said(ask(client, question)) == SORRY
        again = client.post(
            "/v1/expunge/requests", json={"entities": [names[0]]}, headers={"idempotency-key": names[0].replace(" ", "-")}
        )
        assert again.status_code == 200
        assert again.json()["id"] == made[0].json()["id"]
        assert len(client.get("/v1/expunge/requests").json()["data"]) == len(names)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    held = b"".join(p.read_bytes() for p in state.rglob("*") if p.is_file())
    assert not any(n.encode() in held or n.split()[0].encode() in held for n in names)
    assert forget[0][0].encode() not in held
    assert run("evidence", state, "--out", tmp_path / "evidence", cwd=tmp_path).returncode == 0
    auditor = [
        "verify",
        state / "log",
        "--public",
        state / "sign.pem.pub",
        "--checkpoints",
        state / "checkpoints" / "checkpoints.jsonl",
    ]
    entries = ["--entries", tmp_path / "evidence" / "registry.jsonl"]
    good = run(*auditor, *entries, cwd=tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    path = next((state / "log").glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"refused"', b'"passed"', 1))
    bad = run(*auditor, *entries, "--json", cwd=tmp_path)
    assert bad.returncode == 3
    assert "edited" in bad.stdout
