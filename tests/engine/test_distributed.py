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
ADAPTIVE = {"name": "adaptive", "steps": 20, "epochs": 1, "batch": 5}
FIXED = {"name": "fixed", "lr": 3e-3, "steps": 6, "batch": 7, "warmup": 0}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)
# `accelerate launch` refuses --cpu together with --use_fsdp, so its own environment variables are set under torchrun.
TORCHRUN = ("-m", "torch.distributed.run")
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


def launch(
    out: Path, method: str, parts: dict, launcher: tuple[str, ...] = (), extra: dict[str, str] | None = None, mode: str = ""
) -> dict:
    """Run the worker alone, or as two processes under a launcher."""
    words = [sys.executable, *launcher]
    if launcher == ACCELERATE:
        words += ["--num_processes", "2", "--main_process_port", str(free_port())]
    elif launcher:
        words += ["--nproc_per_node", "2", "--master_port", str(free_port())]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **(extra or {})}
    words += [str(WORKER), str(out), method, json.dumps(parts), mode]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if mode == "killed":
        assert done.returncode != 0
        assert not out.is_file()
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def compare(one: dict, two: dict, *, rel: float = 1e-4, atol: float = 1e-4) -> None:
    assert one["losses"] == pytest.approx(two["losses"], rel=rel)
    assert one["lr"] == pytest.approx(two["lr"], rel=1e-6)
    # A gathered sharded model also lists the output head that is tied to the embedding.
    assert one["weights"].keys() == two["weights"].keys() - {"lm_head.weight"}
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("npo", {"schedule": FIXED}),
        ("npo", {"gradient": "project", "schedule": FIXED}),
        ("dpo", {"retain": "kl", "schedule": FIXED}),
        ("npo", {"parameters": "lora", "retain": "kl", "schedule": FIXED}),
        ("rmu", {"schedule": FIXED}),
        ("npo", {"schedule": ADAPTIVE}),
        ("ga-opt", {"schedule": FIXED}),
        ("loku", {"parameters": {"rank": 4}, "schedule": FIXED}),
    ],
    ids=["plain", "project", "copy", "lora", "inner-layer", "adaptive", "several-alternatives", "fila"],
)
def test_two_processes_equal_one(tmp_path: Path, method: str, parts: dict) -> None:
    compare(launch(tmp_path / "one.pt", method, parts), launch(tmp_path / "two.pt", method, parts, ACCELERATE))


@pytest.mark.parametrize(("method", "schedule"), [("npo", FIXED), ("undial", FIXED), ("npo", ADAPTIVE)])
def test_fsdp2_equals_one_process(tmp_path: Path, method: str, schedule: dict) -> None:
    """Parameters, gradients and optimiser state sharded over two processes (FSDP2, gloo): the same weights again."""
    parts = {"schedule": schedule}
    # Twenty steps, the range test before them, amplify the rounding of sums in another order.
    loose = {"rel": 1e-3, "atol": 1e-3} if schedule is ADAPTIVE else {}
    compare(launch(tmp_path / "one.pt", method, parts), launch(tmp_path / "two.pt", method, parts, TORCHRUN, FSDP), **loose)


@pytest.mark.parametrize(("launcher", "extra"), [(ACCELERATE, None), (TORCHRUN, FSDP)], ids=["ddp", "fsdp2"])
def test_two_processes_killed_and_resumed_end_bit_equal(tmp_path: Path, launcher: tuple[str, ...], extra: dict | None) -> None:
    parts = {"schedule": FIXED}
    whole = launch(tmp_path / "whole.pt", "npo", parts, launcher, extra)
    launch(tmp_path / "resumed.pt", "npo", parts, launcher, extra, mode="killed")
    steps = sorted(p.parent.name for p in (tmp_path / "run" / "checkpoint").glob("*/state.json"))
    assert len(steps) == (4 if extra else 1), steps
    resumed = launch(tmp_path / "resumed.pt", "npo", parts, launcher, extra, mode="resumed")
    assert whole["losses"] == resumed["losses"]
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name


def test_fsdp2_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="gradient=plain"):
        launch(tmp_path / "x.pt", "npo", {"gradient": "project", "schedule": FIXED}, TORCHRUN, FSDP)
