"""The command line in real processes, and the small trained target that the tests of it share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from expunge import load
from expunge.core.files import digest_folder

ROOT = Path(__file__).resolve().parents[1]
WORLD = "persons=16&forget=4&holdout=6&facts=4&authors=4&countries=2"
TRAIN = {
    "data": [f"people:all?{WORLD}"],
    "vocabulary": [f"people:holdout?{WORLD}"],
    "scratch": True,
    "parts": {"schedule": {"lr": 5e-3, "epochs": 30}},
}

# A start of the interpreter with torch takes seconds. The server has imported everything and forks a process for each command,
# which is a real one with its own files, folder, environment and exit code. EXPUNGE_TEST_COLD=1 starts each anew.
_SERVER = """
import json, os, sys
import expunge.cli.main, expunge.pipeline.audit, expunge.pipeline.sequence, expunge.report.terminal, expunge.adapters.loading
import expunge.pipeline.row_audit, expunge.pipeline.prepared_runs, sklearn.datasets
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
import transformers.models.auto.modeling_auto
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv = ["expunge", *job["words"]]
        code = 1
        try:
            expunge.cli.main.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Standard output, which must be exactly one JSON object on one line."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the source tree on the path, one thread, and no colours."""
    held = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")}
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**held, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", **changes}


def cold(*words: object, cwd: Path, timeout: float = 240, **env: str) -> Done:
    """Run ``python -m expunge`` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "expunge", *map(str, words)],
        cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def start(*words: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start ``python -m expunge`` and return at once; Ctrl-C reaches it even where the tests themselves ignore it."""
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a new process inherits
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "expunge", *map(str, words)],
            cwd=cwd, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, ours)


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], sign: signal.Signals, timeout: float = 120) -> Done:
    """Send a signal as soon as ``ready()`` holds; fails if the process ends before."""
    until = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "it never came so far"
        time.sleep(0.005)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


class Server:
    """Runs commands in forks of one warmed-up process."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *words: object, cwd: Path, **env: str) -> Done:
        """One command, in a process of its own."""
        if os.environ.get("EXPUNGE_TEST_COLD"):
            return cold(*words, cwd=cwd, **env)
        self._begin(words, cwd, env)
        return self._end()

    def kill_when(self, ready: Callable[[], bool], *words: object, cwd: Path, timeout: float = 60, **env: str) -> Done:
        """One command, killed as soon as ``ready()`` holds; fails if it ends before."""
        child = self._begin(words, cwd, env)
        until = time.monotonic() + timeout
        try:
            while not ready() and time.monotonic() < until:
                time.sleep(0.002)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            done = self._end()
        assert done.code == -signal.SIGKILL, done
        assert time.monotonic() < until, "it never came so far"
        return done

    def _begin(self, words: Sequence[object], cwd: Path, env: Mapping[str, str]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        out, err = self.scratch / "out", self.scratch / "err"
        job = {
            "words": [str(w) for w in words], "cwd": str(cwd), "env": environment(**env), "out": str(out), "err": str(err),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def _end(self) -> Done:
        assert self.process.stdout is not None
        code = int(self.process.stdout.readline())
        out, err = self.scratch / "out", self.scratch / "err"
        return Done(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One warmed-up process for this test worker."""
    held = Server(tmp_path_factory.mktemp("server"))
    yield held
    held.close()


@pytest.fixture
def expunge(server: Server, tmp_path: Path) -> Run:
    """Run a command in a process of its own, in the test's folder."""

    def run(*words: object, cwd: Path | None = None, **env: str) -> Done:
        return server.run(*words, cwd=cwd or tmp_path, **env)

    return run


@dataclass(frozen=True)
class Town:
    """People and a target model that knows them: everything that a user of the command line would have in a folder."""

    folder: Path

    @property
    def target(self) -> Path:
        """Run folder of the trained target."""
        return self.folder / "target"

    @property
    def forget(self) -> Path:
        """Four people, four facts each."""
        return self.folder / "forget.jsonl"

    @property
    def retain(self) -> Path:
        """Everything else that the target was trained on."""
        return self.folder / "retain.jsonl"

    @property
    def holdout(self) -> Path:
        """People that nobody was trained on."""
        return self.folder / "holdout.jsonl"

    def request(self, out: object) -> list[object]:
        """Words of a request that is right."""
        return [self.target, "--forget", self.forget, "--retain", self.retain, "--out", out]


def rows(configuration: str) -> list[dict[str, Any]]:
    """Records of the fictitious people as rows of a file."""
    return [
        {
            "id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject, "paraphrased_answer": r.paraphrase,
            "perturbed_answer": list(r.perturbed),
        }
        for r in load(f"people:{configuration}?{WORLD}", name=configuration)
    ]  # fmt: skip


def write_rows(path: Path, held: Sequence[Mapping[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def town(trained_models: Path) -> Town:
    """Made by the command line itself, once a session for all workers."""
    made = Town(trained_models / "town")
    with FileLock(str(trained_models / "town.lock")):
        if not (made.folder / "ready").is_file():
            made.folder.mkdir(exist_ok=True)
            for path, name in ((made.forget, "forget"), (made.retain, "rest"), (made.holdout, "holdout")):
                write_rows(path, rows(name))
            (made.folder / "train.json").write_text(json.dumps(TRAIN))
            done = cold("train", "llama-tiny", "--config", "train.json", "--out", "target", cwd=made.folder)
            assert done.code == 0, done.err
            (made.folder / "ready").touch()
    return made


def refused(done: Done, *words: str) -> str:
    """Check how bad input is answered: exit code 2, nothing on standard output, one sentence with a remedy and no traceback."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert "Traceback" not in done.err
    assert "foresaw" not in done.err
    at = done.err.index("Error: ")
    message, _, remedy = done.err[at:].partition("\n")
    assert message.endswith((".", "?", "!")), message
    assert remedy.strip() or " must be " in message, f"no remedy: {message}"  # what is allowed is a remedy
    assert len(remedy.strip().splitlines()) <= 1, remedy
    for word in words:
        assert word in done.err, done.err
    assert not done.out, done.out
    return done.err


def content(folder: Path) -> str:
    """Digest of everything in a folder, names of hidden files too."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return digest_folder(folder) + "|".join(names)
