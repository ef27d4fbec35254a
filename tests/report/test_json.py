"""The JSON document and its published schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from expunge.audit.document import AuditDocument, Curve, Series
from expunge.core.errors import InputError
from expunge.report import json as document_json

from . import factory

PUBLISHED = Path(__file__).parents[2] / "docs" / "schema" / "audit.schema.json"


def test_the_published_schema_is_fresh() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == document_json.schema_text(), (
        "the audit document changed: python -m expunge.report.json docs/schema/audit.schema.json"
    )


@pytest.mark.parametrize(
    "document", [factory.document(), factory.full(), factory.ungoverned()], ids=["one", "full", "ungoverned"]
)
def test_written_documents_follow_the_schema_and_come_back(document: AuditDocument, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    document_json.write(document, path)
    value = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(document_json.schema()).validate(value)
    assert document_json.read(path) == document


@pytest.mark.parametrize(
    "change",
    [
        {"models": None},
        {"schema_version": "2"},
        {"surprise": 1},
        {"curves": [{"name": "roc"}]},
    ],
)
def test_the_schema_refuses_what_is_no_document(change: dict[str, object], tmp_path: Path) -> None:
    value = json.loads(document_json.dumps(factory.document())) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(document_json.schema()).validate(value)
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError, match="no audit document of schema version 1") as error:
        document_json.read(path)
    assert next(iter(change)) in error.value.message


def test_the_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(document_json.schema())


def test_numbers_that_json_cannot_carry_are_refused_with_their_place(tmp_path: Path) -> None:
    curve = Curve(name="roc", title="", x_label="", y_label="", series=[Series(label="a", x=[0.0, 1.0], y=[0.0, float("nan")])])
    with pytest.raises(ValueError, match=r"curves\[0\]\.series\[0\]\.y\[1\]"):
        document_json.write(factory.document(curves=[curve]), tmp_path / "audit.json")
    assert not (tmp_path / "audit.json").exists()


@pytest.mark.parametrize(("content", "told"), [("{", "line 1"), ("[]", "schema version"), (None, "cannot be read")])
def test_unreadable_files_are_one_sentence(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        document_json.read(path)
