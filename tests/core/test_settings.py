"""Settings: what is declared, what is refused and how it is said, how overrides are read."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as hyp
from pydantic import Field, ValidationError, field_validator, model_validator

from expunge.core.errors import InputError
from expunge.core.settings import Settings, load_yaml, nest, parse_overrides


class Inner(Settings):
    lr: float = Field(0.1, gt=0, description="step size")

    @field_validator("lr")
    @classmethod
    def _not_seven(cls, value: float) -> float:
        if value == 7:
            raise ValueError("seven is taken")
        return value


class Outer(Settings):
    name: ClassVar[str] = "outer"

    inner: Inner = Inner()
    layers: tuple[int, ...] = Field((), description="which blocks")
    rank: int | None = Field(None, ge=1, le=8, description="rank of it")
    kind: Literal["a", "b"] = "a"
    beta: float = Field(description="needed")

    @model_validator(mode="after")
    def _together(self) -> Outer:
        if self.rank == 8 and self.kind == "b":
            raise ValueError("rank 8 excludes kind b")
        return self


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"lr": -1}}, "Parameter 'lr' of Inner must be a float in (0, inf); got -1."),
        ({"inner": {"lr": 7}}, "Parameter 'lr' of Inner: seven is taken."),
        ({"inner": {"rl": 7}}, "There is no Inner parameter 'rl'. Known: lr."),
        ({"inner": 3}, "Parameter 'inner' of outer must be Inner; got 3."),
        ({"rank": 9}, "Parameter 'rank' of outer must be an int in [1, 8] or none; got 9."),
        ({"rank": "many"}, "Parameter 'rank' of outer must be an int in [1, 8] or none; got 'many'."),
        ({"kind": "c"}, "Parameter 'kind' of outer must be one of a, b; got 'c'."),
        ({"rank": 8, "kind": "b"}, "outer: rank 8 excludes kind b."),
        ({"rnk": 3}, "There is no outer parameter 'rnk'. Did you mean 'rank'?"),
        ({"beta": "big"}, "Parameter 'beta' of outer must be a float; got 'big'."),
    ],
)
def test_wrong_input_names_parameter_owner_allowed_and_given(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Outer(**{"beta": 1, **values})
    assert str(caught.value).rstrip() == said


def test_an_element_of_a_list_is_named_by_its_place() -> None:
    with pytest.raises(InputError, match=r"'layers\.1' of outer .*integer.*got 'x'"):
        Outer(beta=1, layers=[0, "x"])


def test_a_missing_parameter_says_how_to_give_it() -> None:
    with pytest.raises(InputError, match=r"'beta' of outer is missing\. Give it: beta=VALUE\."):
        Outer()


def test_settings_cannot_be_changed_and_equal_ones_are_equal() -> None:
    settings = Inner(lr=0.2)
    with pytest.raises(ValidationError):
        settings.lr = 0.3
    assert settings == Inner(lr=0.2)
    assert Outer.model_validate(Outer(beta=1, layers=[1]).model_dump()) == Outer(beta=1, layers=(1,))


def test_declared_parameters_for_help_pages() -> None:
    declared = {p.name: p for p in Outer.declared()}
    assert list(declared) == ["inner", "layers", "rank", "kind", "beta"]
    assert (declared["rank"].allowed, declared["rank"].default) == ("an int in [1, 8] or none", "none")
    assert (declared["kind"].allowed, declared["kind"].default) == ("one of a, b", "a")
    assert declared["beta"].default == "required"
    assert declared["layers"].default == "none"
    assert declared["beta"].text == "needed"


def test_overrides_read_yaml_scalars_and_lists() -> None:
    words = ["a=1", "b=1e-5", "c=[1, 2]", "d=true", "e=text", "f=", "g=null", "h=2.5E+3", "i=a=b"]
    values = {"a": 1, "b": 1e-5, "c": [1, 2], "d": True, "e": "text", "f": "", "g": None, "h": 2500.0, "i": "a=b"}
    assert parse_overrides(words) == values
    assert isinstance(parse_overrides(["b=1e5"])["b"], float)


@pytest.mark.parametrize("words", [["schedule=paper", "schedule.steps=10"], ["schedule.steps=10", "schedule=paper"]])
def test_a_bare_part_beside_dotted_keys_becomes_its_name(words: list[str]) -> None:
    assert parse_overrides(words) == {"schedule": {"name": "paper", "steps": 10}}


@pytest.mark.parametrize(
    "words",
    [
        ["a=1", "a=2"],
        ["a=x", "a.name=y"],
        ["a.name=y", "a=x"],
        ["a.b=1", "a={b: 2}"],
        ["a={b: 2}", "a.b=1"],
    ],
)
def test_a_parameter_given_twice_in_any_spelling_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="given twice"):
        parse_overrides(words)


@pytest.mark.parametrize("word", ["beta", "=3", "a=[1"])
def test_malformed_overrides_are_refused(word: str) -> None:
    with pytest.raises(InputError):
        parse_overrides([word])


paths = hyp.lists(hyp.sampled_from("abc"), min_size=1, max_size=3)


@given(hyp.lists(paths, unique_by=tuple, max_size=6))
def test_nest_keeps_every_value_or_refuses(keys: list[list[str]]) -> None:
    flat = {".".join(path): i for i, path in enumerate(keys)}
    try:
        nested = nest(flat)
    except InputError:
        return
    for path, value in zip(keys, flat.values(), strict=True):
        at = nested
        for step in path:
            at = at[step]
        assert (at["name"] if isinstance(at, dict) else at) == value


def test_yaml_numbers_are_numbers() -> None:
    assert load_yaml("a: 1e-5\nb: -2E3\nc: 1.5e+2") == {"a": 1e-5, "b": -2000.0, "c": 150.0}


def test_none_is_no_value_as_it_is_printed() -> None:
    assert parse_overrides(["clip=none", "a=None", "b=null"]) == {"clip": None, "a": None, "b": None}
    assert parse_overrides(["name=nonesuch", "quoted='none'"]) == {"name": "nonesuch", "quoted": "none"}
    assert load_yaml("clip: none") == {"clip": None}
