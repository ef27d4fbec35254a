"""Files that are never half written: killed writers, failing writers, folders, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as hyp

from expunge.core import files
from expunge.core.errors import InputError


def start(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), *words], stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_file_appears_whole_and_scratch_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "hé\n")
    assert path.read_bytes() == "hé\n".encode()
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failing_writer_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), files.atomic_path(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [False, True])
def test_a_writer_that_writes_nothing_does_not_cost_the_old_content(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "a"
    if folder:
        path.mkdir()
        (path / "kept").write_text("old")
    else:
        path.write_text("old")
    with pytest.raises(FileNotFoundError), files.atomic_path(path):
        pass
    assert (path / "kept" if folder else path).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_replaces_a_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:  # a system without the exchange call
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path = tmp_path / "run"
    for name in ("one", "two"):
        with files.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["two"]
    assert len(list(tmp_path.iterdir())) == 1


def test_exchange_swaps_or_says_no(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "from-a").touch()
    if files._exchange(a, b):
        assert (b / "from-a").exists()
    else:
        assert (a / "from-a").exists()
    assert not files._exchange(a, tmp_path / "missing")


@pytest.mark.parametrize("folder", [False, True])
def test_kill_in_the_middle_of_a_write_leaves_the_old_content(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "a"
    if folder:
        path.mkdir()
        (path / "kept").write_text("old")
    else:
        path.write_text("old")
    program = """
        import sys, time
        from pathlib import Path
        from expunge.core.files import atomic_path
        with atomic_path(Path(sys.argv[1])) as temporary:
            target = temporary
            if sys.argv[2] == "True":
                temporary.mkdir()
                target = temporary / "kept"
            with target.open("w") as handle:
                handle.write("new, but only half of i")
                handle.flush()
                print("writing", flush=True)
                time.sleep(60)
    """
    process = start(program, str(path), str(folder))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    kill(process)
    kept = path / "kept" if folder else path
    assert kept.read_text() == "old"
    leftovers = [p for p in tmp_path.iterdir() if p != path]
    assert len(leftovers) == 1
    before = files.digest_folder(tmp_path)
    # The next writer of the same path clears what the dead one left, once it cannot be a newborn's.
    os.utime(leftovers[0], (time.time() - 3600, time.time() - 3600))
    if folder:
        with files.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / "kept").write_text("old")
    else:
        files.write_text(path, "old")
    assert [p for p in tmp_path.iterdir() if p != path] == []
    assert files.digest_folder(tmp_path) == before  # the leftover never counted


def test_the_scratch_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.atomic_path(path) as temporary:
        temporary.write_text("mine")
        os.utime(temporary.parent, (0, 0))
        program = (
            "import sys; from pathlib import Path; from expunge.core.files import write_text; write_text(Path(sys.argv[1]), 'x')"
        )
        assert start(program, str(path)).wait() == 0
        assert temporary.read_text() == "mine"
    assert path.read_text() == "mine"


def test_kills_at_any_moment_leave_one_whole_generation(tmp_path: Path) -> None:
    """A writer replaces a folder of two files that must agree, as fast as it can, and is killed at arbitrary times."""
    path = tmp_path / "checkpoint"
    program = """
        import itertools, sys
        from pathlib import Path
        from expunge.core.files import atomic_path
        for turn in itertools.count(int(sys.argv[2])):
            with atomic_path(Path(sys.argv[1])) as temporary:
                temporary.mkdir()
                for name in ("weights", "state"):
                    (temporary / name).write_text(str(turn) * 2000)
            if turn % 20 == 1:
                print(turn, flush=True)
    """
    for turn in range(8):
        process = start(program, str(path), str(1000 * turn))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.003 * turn)
        kill(process)
        assert (path / "weights").read_text() == (path / "state").read_text()
        assert len((path / "weights").read_text()) % 2000 == 0


def test_json_is_readable_ordered_and_refuses_nan_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["b"] == 1


# --- hashes ------------------------------------------------------------------------------------------------------------------


@given(hyp.lists(hyp.binary(max_size=4), max_size=4), hyp.lists(hyp.binary(max_size=4), max_size=4))
def test_different_parts_never_share_a_digest(a: list[bytes], b: list[bytes]) -> None:
    assert (files.digest_bytes(*a) == files.digest_bytes(*b)) == (a == b)


def test_a_json_digest_does_not_depend_on_the_order_of_keys_or_on_the_hash_seed() -> None:
    assert files.digest_json({"a": 1, "b": [2]}) == files.digest_json({"b": [2], "a": 1})
    assert files.digest_json({"a": 1}) != files.digest_json({"a": "1"})
    assert files.digest_json(Path("x/y")) == files.digest_json("x/y")
    program = "from expunge.core.files import digest_json; print(digest_json({'s': {'alpha', 'beta', 'gamma', 'delta'}}))"
    found = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_what_has_no_stable_text_has_no_digest() -> None:
    with pytest.raises(TypeError, match="no stable digest"):
        files.digest_json({"a": object()})


def test_file_and_folder_digests(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert files.digest_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    first = files.digest_folder(tmp_path)
    (tmp_path / "sub").mkdir()
    assert files.digest_folder(tmp_path) == first  # empty folders hold nothing
    (tmp_path / "sub" / "b").write_text("b")
    second = files.digest_folder(tmp_path)
    assert second != first
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert files.digest_folder(tmp_path) != second


def test_room_is_checked_for_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    files.check_room(tmp_path / "not" / "yet", 1, "A file")
    with pytest.raises(InputError, match=r"A model needs about .* TiB"):
        files.check_room(tmp_path / "not" / "yet", 1 << 80, "A model")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_sizes_for_people(n: int, text: str) -> None:
    assert files.size(n) == text
