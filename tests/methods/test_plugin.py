"""A package outside of Expunge adds a term, a method and a metric by entry point alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which the plug-in looks installed: its folder on the path, its metadata beside it as pip writes it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "expunge_example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    path = os.pathsep.join([str(tmp_path), str(PLUGIN), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_and_a_term_come_by_entry_point(installed):
    out = run(
        """
        import torch
        from expunge.methods.catalogue import describe, serves
        from expunge.methods.evaluate import Given, loss_terms
        from expunge.methods.recipe import build, from_spec
        from expunge.methods.registry import METHODS, TERMS

        assert METHODS.get("example-method").title == "Unlikelihood training"
        assert METHODS.broken() == TERMS.broken() == {}
        print(METHODS.origin("example-method"), TERMS.origin("unlikelihood"), METHODS.origin("npo"))

        recipe = build("example-method", {"forget.weight": 2, "gradient": "project"})
        assert from_spec(recipe.spec()) == recipe
        assert describe("example-method").wants == ("retain",)

        logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
        crossed = build("npo", {"forget": ["unlikelihood", "simnpo"]})
        values = loss_terms(crossed, forget=Given(logits, labels), retain=Given(logits, labels))
        torch.testing.assert_close(values["forget.unlikelihood"], -torch.log(torch.tensor(0.75)))
        """,
        installed,
    )
    assert out.split() == ["expunge-example", "expunge-example", "expunge"]


def test_without_it_the_method_is_not_there():
    from expunge.methods.registry import METHODS

    assert "example-method" not in METHODS


def test_a_broken_plug_in_is_reported_and_hides_nothing(installed, tmp_path):
    points = tmp_path / "expunge_example-0.1.dist-info" / "entry_points.txt"
    points.write_text(
        "[expunge.methods]\nbroken = expunge_example.nowhere:method\nexample-method = expunge_example.method:example\n"
    )
    out = run(
        """
        from expunge.methods.registry import METHODS
        print(sorted(METHODS.broken()), METHODS.broken()["broken"])
        assert {"npo", "example-method"} <= set(METHODS.names())
        """,
        installed,
    )
    assert "['broken']" in out
    assert "expunge-example: ModuleNotFoundError" in out


def test_a_plug_in_cannot_take_the_name_of_a_method_that_is_there(installed, tmp_path):
    (tmp_path / "expunge_example-0.1.dist-info" / "entry_points.txt").write_text(
        "[expunge.methods]\nnpo = expunge_example.method:example\n"
    )
    out = run(
        """
        from expunge.methods.registry import METHODS
        print(METHODS.get("npo").title, METHODS.origin("npo"), METHODS.broken()["npo"])
        """,
        installed,
    )
    assert out.startswith("Negative preference optimisation expunge expunge-example: InputError: Two methods are called 'npo'")


def _audit_is_there() -> bool:
    try:
        return importlib.util.find_spec("expunge.audit.metrics.registry") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not _audit_is_there(), reason="the registry of metrics has not been merged yet")
def test_a_metric_comes_by_entry_point(installed):
    out = run(
        """
        import math
        from expunge.audit.metrics.registry import METRICS, evaluate_metric

        assert METRICS.get("top-token").title == "Probability of the best-known token"
        assert METRICS.broken() == {}
        assert math.isclose(evaluate_metric("top-token", logp=[math.log(0.2), math.log(0.7)]), 0.7)
        print(METRICS.origin("top-token"))
        """,
        installed,
    )
    assert out.strip() == "expunge-example"
