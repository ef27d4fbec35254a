"""One process and two end equal, by real ``accelerate launch`` over gloo; sharded (FSDP2) too."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("distributed_worker.py")
FIXED = {"name": "fixed", "lr": 3e-3, "steps": 6, "batch": 7, "warmup": 0}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def launch(out: Path, method: str, parts: dict, processes: int, *flags: str) -> dict:
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
        words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*words, str(WORKER), str(out), method, json.dumps(parts)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def compare(one: dict, two: dict) -> None:
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    assert one["lr"] == two["lr"]
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("npo", {"schedule": FIXED}),
        ("npo", {"gradient": "project", "schedule": FIXED}),
        ("dpo", {"retain": "kl", "schedule": FIXED}),
        ("npo", {"parameters": "lora", "retain": "kl", "schedule": FIXED}),
        ("rmu", {"schedule": FIXED}),
        ("npo", {"schedule": {"name": "adaptive", "steps": 20, "epochs": 1, "batch": 5}}),
    ],
    ids=["plain", "project", "copy", "lora", "inner-layer", "adaptive"],
)
def test_two_processes_equal_one(tmp_path: Path, method: str, parts: dict) -> None:
    compare(launch(tmp_path / "one.pt", method, parts, 1), launch(tmp_path / "two.pt", method, parts, 2))


def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    parts = {"schedule": FIXED}
    flags = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type", "FULL_STATE_DICT")
    compare(launch(tmp_path / "one.pt", "npo", parts, 1), launch(tmp_path / "two.pt", "npo", parts, 2, *flags))
