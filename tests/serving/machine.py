"""Real server processes before a server of this one, and disks that can be made full."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.serving.test_requests import FORGET

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@dataclass
class Process:
    """``expunge serve`` in a process of its own.

    Attributes:
        folder: where its guard file and its standard error go.
        words: of the command line, without guard file and port.
    """

    folder: Path
    words: tuple = ()
    guards: str = "guards: [filter]\n"
    environment: dict = field(default_factory=dict)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "guards.yaml").write_text(self.guards)

    def begin(self, ready=True):
        """Start it, and wait until it is ready."""
        port = free_port()
        line = [sys.executable, "-m", "expunge", "serve", *map(str, self.words), "--guard", str(self.folder / "guards.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **self.environment}
        environment.pop("EXPUNGE_GUARD_KEY", None)
        self.errors = (self.folder / "errors.txt").open("a+")
        self.process = subprocess.Popen([*line, "--port", str(port)], stdout=self.errors, stderr=self.errors, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        end = time.monotonic() + 90
        while ready:
            assert self.process.poll() is None, self.said
            try:
                if self.client.get("/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < end, self.said
            time.sleep(0.05)
        return self

    @property
    def said(self):
        """What it has written so far."""
        return (self.folder / "errors.txt").read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.client.close()

    def end(self):
        """Tell it to end, and wait; seconds that it took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.client.close()
        return time.monotonic() - began

    def __enter__(self):
        return self.begin()

    def __exit__(self, *_):
        self.end()
        self.errors.close()

    def forget(self, name, key=None, **more):
        return self.client.post(FORGET, json={"entities": [name], **more}, headers={"idempotency-key": key} if key else {})

    def metric(self, name):
        found = re.search(rf"^{re.escape(name)} ([\d.e+-]+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else None

    def files_at_most(self, size):
        """No file may grow beyond so many bytes from now on: as on a full disk, writes end short or fail."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@dataclass
class SmallDisk:
    """A file system of its own, in memory, of a few megabytes; needs the right to mount one."""

    path: Path

    @classmethod
    def mounted(cls, path, size="4m"):
        """One, or none where this process may not mount it."""
        path.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
        try:
            done = subprocess.run(line, capture_output=True, check=False, timeout=10)
        except FileNotFoundError:
            return None
        return cls(path) if done.returncode == 0 else None

    def fill(self):
        """Take all the room there is."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            size = 1 << 16
            while size:
                try:
                    if file.write(b"\0" * size) < size:
                        size //= 2
                except OSError:
                    size //= 2

    def clear(self):
        (self.path / "ballast").unlink()

    def unmount(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True, timeout=10)


def kept(state):
    """All bytes that a state holds."""
    return b"".join(p.read_bytes() for p in Path(state).rglob("*") if p.is_file())
