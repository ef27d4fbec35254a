"""The audit document as JSON, and the JSON schema that describes it.

``python -m expunge.report.json docs/schema/audit.schema.json`` writes the published schema anew.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expunge.audit.document import SCHEMA_VERSION, AuditDocument
from expunge.core.errors import InputError
from expunge.core.files import write_text


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the files that :func:`write` writes."""
    body = AuditDocument.model_json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:expunge:audit:{SCHEMA_VERSION}",
        **body,
        "title": "Expunge audit document",
    }


def schema_text() -> str:
    """The schema as the published file holds it."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def dumps(document: AuditDocument) -> str:
    """``document`` as indented JSON text.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot carry; the message names where it stands.
    """
    value = document.model_dump(mode="json")
    where = _not_finite(value)
    if where:
        raise ValueError(f"the audit document holds a number that is not finite at {where}")
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(document: AuditDocument, path: Path) -> None:
    """Write ``document`` to ``path`` in one step (:func:`dumps`)."""
    write_text(path, dumps(document))


def read(path: Path) -> AuditDocument:
    """The document in ``path``.

    Raises:
        InputError: there is no such file, it is no JSON, or it does not follow the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The audit {str(path)!r} cannot be read ({error}).", "Make it first: expunge audit RUN.") from None
    try:
        return AuditDocument.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{str(path)!r} is no JSON (line {error.lineno}: {error.msg}).", "Make it anew: expunge audit RUN."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(p) for p in first["loc"])
        raise InputError(
            f"{str(path)!r} is no audit document of schema version {SCHEMA_VERSION} ({at}: {first['msg']}).",
            "Make it anew with this version: expunge audit RUN.",
        ) from None


def _not_finite(value: Any, path: str = "") -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else path
    if isinstance(value, dict):
        return next((at for k, v in value.items() if (at := _not_finite(v, f"{path}.{k}" if path else str(k)))), "")
    if isinstance(value, list):
        return next((at for i, v in enumerate(value) if (at := _not_finite(v, f"{path}[{i}]"))), "")
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m expunge.report.json FILE")
    write_text(Path(sys.argv[1]), schema_text())
