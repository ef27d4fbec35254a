"""The registry of benchmarks: a declaration is found by name, its options are typed, and its axes are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from expunge.audit.metrics.papers import TOFU
from expunge.benchmarks.registry import Axis, Benchmark, Source, benchmark, where
from expunge.core.errors import InputError
from expunge.core.registry import Registry
from expunge.engine.parts import Paper


class Toy(Benchmark):
    """One set, one number."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    paper: ClassVar[Paper] = TOFU
    licence: ClassVar[str] = "none"
    home: ClassVar[str] = "nowhere"
    items: int = Field(3, ge=1, description="how many")

    def sources(self) -> Mapping[str, Source]:
        return {"facts": Source("people:world" + where(self.data, countries=self.items), "facts")}

    def axes(self) -> Sequence[Axis]:
        return (Axis("p", "Probability", "probability", {"facts": "facts"}, "facts.probability"),)

    def sample(self, folder: Path, seed: int = 0) -> None:
        folder.mkdir(parents=True)


def test_a_benchmark_is_found_by_its_name_and_its_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    held: Registry[type[Benchmark]] = Registry("benchmark")
    monkeypatch.setattr("expunge.benchmarks.registry.BENCHMARKS", held)
    assert benchmark(Toy) is Toy
    assert held.get("toy")(items=4).sources()["facts"].reference == "people:world?countries=4"
    with pytest.raises(InputError, match="toy"):
        held.get("toi")
    with pytest.raises(InputError, match="items"):
        Toy(items=0)
    with pytest.raises(InputError, match="item"):
        Toy(item=4)


def test_an_unknown_axis_is_refused_with_the_nearest() -> None:
    assert Toy().axis("p").metric == "probability"
    with pytest.raises(InputError, match="toy axis"):
        Toy().axis("q")


def test_a_query_holds_what_is_given() -> None:
    assert where("") == ""
    assert where("/a", corpus="", shots=0, strict=True) == "?folder=/a&shots=0&strict=True"
    with pytest.raises(InputError, match="Rename"):
        where("my data")
