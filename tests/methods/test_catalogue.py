"""What is declared about methods, and which modalities they serve."""

from __future__ import annotations

import pytest

from expunge.core.access import Offer
from expunge.methods.catalogue import describe, serves
from expunge.methods.registry import METHODS

LOSSES = frozenset({Offer.LOSSES})
CLASSIFIER = frozenset({Offer.LOSSES, Offer.LOGITS, Offer.FEATURES})


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_is_documented(name):
    found = describe(name)
    assert len(found.text) > 80
    assert found.title
    assert found.formula
    assert found.caveats
    assert all(c.endswith(".") for c in found.caveats)
    assert found.paper.url.startswith("https://")
    assert 2000 < found.paper.year < 2100
    assert found.origin == "expunge"
    for part in (*found.parts, found.published):
        for parameter in part.parameters:
            assert parameter.text, f"{part.name}.{parameter.name} has no description"


def test_parameters_show_the_methods_own_defaults_and_their_ranges():
    found = {(p.slot, q.name): q for p in describe("simnpo").parts for q in p.parameters}
    assert found["forget", "weight"].default == "0.125"
    assert found["forget", "beta"].default == "4.5"
    assert found["forget", "beta"].allowed == "a float in (0, inf)"
    assert found["retain", "reduction"].allowed == "one of token, sequence, sum"


def test_needs_are_derived_from_the_terms():
    assert describe("npo").needs == (Offer.LOSSES,)
    assert describe("npo").reads_reference == ("losses",)
    assert describe("simnpo").reads_reference == ()
    assert describe("undial").needs == (Offer.LOGITS, Offer.LOSSES)
    assert describe("rmu").reads_reference == ("features",)
    assert describe("idkdpo").needs == (Offer.LOSSES, Offer.TEXT)


@pytest.mark.parametrize(
    ("name", "wants", "alternatives"),
    [
        ("gradascent", (), None),
        ("npo", ("retain",), None),
        ("idkdpo", ("retain", "alternatives"), "refusals"),
        ("altpo", ("retain", "alternatives"), "others"),
        ("retrain", ("retain", "base"), None),
        ("task-vector", (), None),
    ],
)
def test_wanted_data(name, wants, alternatives):
    assert METHODS.get(name).wants == wants
    assert describe(name).alternatives == alternatives


def test_which_modalities_a_method_serves():
    assert serves("npo", LOSSES) == (True, ())
    assert serves("rmu", LOSSES) == (False, (Offer.FEATURES,))
    assert serves("rmu", CLASSIFIER) == (True, ())
    assert serves("idk-nll", CLASSIFIER) == (False, (Offer.TEXT,))
    assert all(serves(m, frozenset(Offer))[0] for _, m in METHODS.items())
