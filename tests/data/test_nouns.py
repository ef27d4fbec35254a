"""Words that carry what a text tells: by rules, or by a tagger that is on the machine."""

from __future__ import annotations

import pytest

from expunge.core.errors import InputError
from expunge.data.nouns import finder

TEXT = "In May 2019 Ada Byron's cat ate 7 of the old-fashioned pies."


def found(name: str) -> list[str]:
    return [TEXT[a:b] for a, b in finder(name)(TEXT)]


def test_the_rules() -> None:
    assert found("long") == ["2019", "Byron's", "7", "fashioned", "pies"]
    assert found("capitalised") == ["In", "May", "2019", "Ada", "Byron's", "7"]
    assert finder("long")("") == []


def test_what_is_not_at_hand_is_refused_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError, match="not on this machine, and nothing is downloaded"):
        finder("nltk")
    with pytest.raises(InputError, match="spaCy"):
        finder("spacy:no_such_pipeline")
    with pytest.raises(InputError, match=r"called 'verbs'.*long, capitalised, nltk, spacy:MODEL"):
        finder("verbs")


def test_the_tags_of_a_tagger_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface of nltk alone: its data need not be there."""
    nltk = pytest.importorskip("nltk")
    nouns = {"May": "NNP", "Ada": "NNP", "cat": "NN", "pies": "NNS"}
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(w, nouns.get(w, "VB")) for w in words])
    assert found("nltk") == ["May", "Ada", "cat", "pies"]
