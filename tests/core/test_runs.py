"""Run folders: what may be gone on with, and what is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.core.files import check_room, check_writable, digest_folder
from expunge.core.runs import Run


def test_stage_is_skipped_only_for_the_same_inputs_and_outputs(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", "test", {"a": 1})
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        (run.folder / "out.txt").write_text("made")
        return {"n": len(calls)}

    assert run.stage("s", {"data": "x"}, work, ["out.txt"]) == {"n": 1}
    assert run.skipped == []
    assert run.stage("s", {"data": "x"}, work, ["out.txt"]) == {"n": 1}
    assert run.skipped == ["s"]
    (run.folder / "out.txt").write_text("other")
    assert run.stage("s", {"data": "x"}, work, ["out.txt"]) == {"n": 2}
    assert run.stage("s", {"data": "y"}, work, ["out.txt"]) == {"n": 3}
    assert run.skipped == ["s"]


def test_begun_stage_is_bound_to_its_inputs(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "run", "test", {})
    run.check_same("s", {"data": "x"})  # nothing was begun

    def killed() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("s", {"data": "x", "recipe": [1, 2]}, killed, [])
    again = Run.open(run.folder)
    again.check_same("s", {"data": "x", "recipe": (1, 2)})
    with pytest.raises(InputError, match="changed: data"):
        again.check_same("s", {"data": "y", "recipe": [1, 2]})
    with pytest.raises(InputError, match="changed: engine, recipe"):
        again.check_same("s", {"data": "x", "recipe": [1], "engine": 0})


def test_leftovers_of_a_killed_start_do_not_stand_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / ".manifest.json.abc.partial").mkdir(parents=True)
    assert Run.start(folder, "test", {}).manifest["kind"] == "test"
    other = tmp_path / "other"
    other.mkdir()
    (other / ".hidden").write_text("somebody's")
    before = digest_folder(other)
    with pytest.raises(InputError, match="holds no run"):
        Run.start(other, "test", {})
    assert digest_folder(other) == before


def test_what_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file"):
        check_writable(file / "deep" / "run")
    check_writable(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(InputError, match="are free"):
        check_room(tmp_path / "deep" / "run", 1 << 62, "A test")
    check_room(tmp_path / "deep" / "run", 1, "A test")
