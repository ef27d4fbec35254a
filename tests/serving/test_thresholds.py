"""The log says from which score on a guard notices, and what was promised of how many ordinary prompts; never their words."""

import json
import math

import pytest

from expunge.guards.policy import SORRY
from expunge.ledger.auditing import audit
from expunge.ledger.records import Versions
from expunge.ledger.verify import activated, records
from expunge.serving.kept import State
from tests.serving.conftest import running
from tests.serving.test_answers import ask, said
from tests.serving.test_requests import FORGET
from tests.serving.upstream import upstream_app

RATE = 0.04
SUBJECTS = ("violins", "copper", "herons", "bridges", "yeast", "glaciers", "chess", "looms", "maps", "kites")
PROMPTS = [f"How were {s} made in the year {1700 + 7 * n}, and by whom?" for s in SUBJECTS for n in range(10)]
ASKED = "Where did Samuel Penhaligon bury the silver of the abbey?"


@pytest.fixture
def target_adapter():
    """No model is needed: these servers stand before another one."""


def test_thresholds_stand_in_the_log_from_activation_on_and_with_each_decision(serve, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "x"}) + "\n" for p in PROMPTS))
    state = State.open(tmp_path / "state", Versions("ab" * 32))
    rows = [
        {"detector": "terms", "action": "refuse"},
        {"detector": {"name": "similar", "rate": RATE}, "action": "refuse"},
        {"detector": {"name": "similar", "threshold": 0.7}, "action": "refuse", "label": "given"},
    ]
    file = {"ordinary": str(tmp_path / "p.jsonl")}
    with (
        running(upstream_app({"?": "Under the oak."})) as url,
        serve(rows, (), upstream=f"{url}/v1", state=state, file=file) as client,
    ):
        policy = client.served.policy
        assert not activated(tmp_path / "state" / "log"), "a threshold comes with a target"
        client.post(FORGET, json={"examples": [{"prompt": ASKED, "answer": "Under the oak."}]})
        one = policy.bounds["similar+refuse"].value
        assert said(ask(client, ASKED)) == SORRY
        assert said(ask(client, "Is it raining?")) != SORRY
        client.post(FORGET, json={"topics": ["who made herons of copper"]})
        two = policy.bounds["similar+refuse"].value
        assert two > one, "what is near an ordinary prompt moves the threshold"
        assert said(ask(client, ASKED)) == SORRY
    state.close()
    log = tmp_path / "state" / "log"
    found = activated(log)
    fitted, given = ([f for f in found if f["row"] == row] for row in (1, 2))
    assert [f["threshold"] for f in fitted] == [round(one, 6), round(two, 6)]
    assert not [f for f in found if f["row"] == 0]
    n = len(PROMPTS) // 2
    promised = math.floor(RATE * (n + 1)) / (n + 1)
    for said_of in fitted:
        assert (said_of["detector"], said_of["ordinary"], said_of["rate"]) == ("similar", n, RATE)
        assert said_of["promised"] == pytest.approx(promised, abs=1e-6)
        assert promised < said_of["upper"] < 0.2
    assert [(g["threshold"], g["ordinary"], g["promised"]) for g in given] == [(0.7, 0, None)]
    decided = [r["rows"][1]["threshold"] for _, r in records(log) if r["kind"] == "request"]
    assert decided == [round(one, 6), round(one, 6), round(two, 6)]
    held = b"".join(p.read_bytes() for p in (tmp_path / "state").rglob("*") if p.is_file())
    words = {w for p in (*PROMPTS, ASKED, "Under the oak") for w in p.replace(",", " ").replace("?", " ").split() if len(w) > 5}
    assert not [w for w in words if w.encode() in held]
    report = audit(log, tmp_path / "state" / "sign.pem.pub", tmp_path / "state" / "checkpoints" / "checkpoints.jsonl")
    assert report.exit_code == 0
    assert any(f"set by {n} ordinary prompts" in line and "at most" in line for line in report.lines())
    assert any("nothing is promised" in line for line in report.lines())
    json.dumps(report.described())
