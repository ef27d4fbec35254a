"""A registry on SQLite, and on a real PostgreSQL where its programs are installed."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.ledger.keys import KeyStore, MasterKey
from expunge.ledger.registry import Registry


@dataclass
class Place:
    """Where a registry stands."""

    where: str
    folder: Path

    @property
    def keys(self):
        return KeyStore(self.folder / "keys", MasterKey.from_file(self.folder / "master.key"))

    def open(self, **options):
        return Registry(self.where, self.keys, **options)


def program(name):
    found = shutil.which(name)
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(newest[-1]) if newest else found


@dataclass
class Cluster:
    """A PostgreSQL server of the test's own: on a socket, by nobody but this session."""

    folder: Path
    options: dict

    def url(self, name):
        user = self.options.get("user") or os.environ.get("USER", "root")
        return f"postgresql://{user}@/{name}?host={self.folder}"

    def make(self):
        """The URL of an empty database."""
        import psycopg

        url = self.url("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url

    def control(self, *words):
        command = [program("pg_ctl"), "-D", str(self.folder / "data"), "-w", "-l", str(self.folder / "log"), *words]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL, **self.options)

    def start(self):
        self.control("-o", f"-c fsync=off -c listen_addresses='' -k {self.folder}", "start")


@pytest.fixture(scope="session")
def cluster():
    pytest.importorskip("psycopg")
    if not all(program(p) for p in ("initdb", "pg_ctl")):
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="expunge-pg-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    options = {"cwd": str(folder)}
    if os.geteuid() == 0:  # the server refuses to run as root
        options |= {
            "user": "nobody",
            "group": "nogroup",
            "extra_groups": [],
            "env": {**os.environ, "USER": "nobody", "HOME": str(folder)},
        }
        shutil.chown(folder, "nobody", "nogroup")
    made = Cluster(folder, options)
    try:
        command = [program("initdb"), "-D", str(folder / "data"), "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, **options)
        made.start()
        yield made
        made.control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    where = str(tmp_path / "registry.db") if request.param == "sqlite" else request.getfixturevalue("cluster").make()
    return Place(where, tmp_path)


@pytest.fixture
def local(tmp_path):
    """On SQLite only."""
    return Place(str(tmp_path / "registry.db"), tmp_path)
