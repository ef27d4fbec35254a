"""The registry, with real packages and real entry points made on disk."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.core.registry import Registry

GROUP = "expunge.tests.colours"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def distribution(site: Path, name: str, module: str, points: str) -> None:
    """Install a distribution the way pip does: a module and its metadata."""
    (site / f"{name}.py").write_text(textwrap.dedent(module))
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{textwrap.dedent(points)}\n")
    importlib.invalidate_caches()


def red() -> str:
    return "red"


def blue() -> str:
    return "blue"


def test_names_are_held_and_unknown_ones_meet_suggestions() -> None:
    colours: Registry[object] = Registry("colour")
    assert colours.register("red")(red) is red
    colours.add("dark-blue", blue)
    assert colours.get("red") is red
    assert colours.names() == ["dark-blue", "red"]
    assert list(colours.items()) == [("dark-blue", blue), ("red", red)]
    assert "red" in colours
    assert "green" not in colours
    with pytest.raises(InputError, match=r"no colour 'dark-blu'\. Did you mean 'dark-blue'"):
        colours.get("dark-blu")


@pytest.mark.parametrize("name", ["", "Red", "a b", "-", "a.b", "a/b"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no name for a colour"):
        Registry("colour").add(name, red)


def test_two_objects_cannot_share_a_name_but_a_reloaded_one_may_return() -> None:
    colours: Registry[object] = Registry("colour")
    colours.add("red", red)
    with pytest.raises(InputError, match="Two colours are called 'red'"):
        colours.add("red", blue)

    def again() -> str:
        return "red"

    again.__qualname__ = red.__qualname__
    colours.add("red", again)
    assert colours.get("red") is again


def test_built_ins_are_imported_when_first_needed(site: Path) -> None:
    package = site / "palette_pkg"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from expunge.core.registry import Registry\nCOLOURS = Registry('colour', 'palette_pkg')\n"
    )
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "warm.py").write_text("from palette_pkg import COLOURS\nCOLOURS.add('red', object())\n")
    colours = importlib.import_module("palette_pkg").COLOURS
    assert "palette_pkg.deep.warm" not in sys.modules
    assert colours.names() == ["red"]
    assert colours.origin("red") == "expunge"


def test_a_built_in_module_that_fails_says_so_every_time(site: Path) -> None:
    package = site / "broken_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("raise RuntimeError('half installed')\n")
    colours: Registry[object] = Registry("colour", "broken_pkg")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half installed"):
            colours.names()


def test_an_outside_package_adds_an_object_a_module_and_a_decorated_function(site: Path) -> None:
    (site / "registry_of_colours.py").write_text(
        f"from expunge.core.registry import Registry\nCOLOURS = Registry('colour', None, {GROUP!r})\n"
    )
    distribution(site, "plain_colours", "def teal():\n    return 'teal'\n", "teal = plain_colours:teal")
    module = """
        from registry_of_colours import COLOURS
        @COLOURS.register("amber")
        def amber(): return "amber"
        @COLOURS.register("ochre")
        def ochre(): return "ochre"
    """
    distribution(site, "module_colours", module, "anything = module_colours")
    decorated = """
        from registry_of_colours import COLOURS
        @COLOURS.register("mauve")
        def mauve(): return "mauve"
    """
    distribution(site, "decorated_colours", decorated, "other = decorated_colours:mauve")
    colours = importlib.import_module("registry_of_colours").COLOURS
    assert colours.names() == ["amber", "mauve", "ochre", "teal"]
    assert {n: c() for n, c in colours.items()} == {n: n for n in colours.names()}
    assert colours.origin("teal") == "plain_colours"
    assert colours.origin("ochre") == "module_colours"
    assert colours.origin("mauve") == "decorated_colours"
    assert colours.broken() == {}


def test_a_broken_plug_in_is_reported_and_hides_nobody(site: Path) -> None:
    distribution(site, "bad_colours", "raise ImportError('no paint')\n", "grey = bad_colours:grey")
    distribution(site, "good_colours", "def teal():\n    return 'teal'\n", "teal = good_colours:teal")
    distribution(site, "thief_colours", "def red():\n    return 'stolen'\n", "red = thief_colours:red")
    distribution(site, "loud_colours", "def loud():\n    return 'loud'\n", "LOUD = loud_colours:loud")
    colours: Registry[object] = Registry("colour", None, GROUP)
    colours.add("red", red)
    assert colours.names() == ["red", "teal"]
    assert colours.get("red") is red
    assert colours.origin("red") == "expunge"
    broken = colours.broken()
    assert set(broken) == {"grey", "red", "LOUD"}
    assert broken["grey"] == "bad_colours: ImportError: no paint"
    assert "Two colours are called 'red'" in broken["red"]


def test_the_core_imports_without_the_optional_packages() -> None:
    """A meta path finder that refuses them stands for an environment that lacks them."""
    program = """
        import importlib, pkgutil, sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"transformers", "peft", "datasets", "matplotlib", "rouge_score"}:
                    raise ImportError(name)
        sys.meta_path.insert(0, Absent())
        import expunge.core
        for info in pkgutil.walk_packages(expunge.core.__path__, "expunge.core."):
            importlib.import_module(info.name)
        print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
