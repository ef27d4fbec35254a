"""Rows become records: which columns say what, and every check on a row's values.

Four shapes are recognised by the columns of the first row, in this order:

==================================================== ===========================================================
columns                                              record
==================================================== ===========================================================
``question`` or ``prompt``, and ``answer``           prompt and answer, put into the template
or ``response``
``question`` or ``prompt``, and ``completion``       prompt and answer, joined as they are
``messages`` (list of ``{role, content}``)           the last turn, by the assistant, is the answer; the earlier
                                                     turns are its context
``text``                                             plain text
==================================================== ===========================================================

Optional columns: ``id``; ``subject`` or ``author`` (the independent unit); ``paraphrased_answer``; ``paraphrased_question``;
``perturbed_answer`` (list); ``alternatives`` or ``alternate`` (text or list); ``spans`` (a list of ``[start, end]`` or of
``{start, end}``: characters of the answer, or of the text, that are treated otherwise than the rest, the end not included);
``lead`` (how the answer is made to begin; given, not learnt). Other columns are ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from expunge.core.errors import InputError, nearest, unknown
from expunge.data.records import Record
from expunge.data.spans import Span, check_spans, joined

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "prompt"),
    "answer": ("answer", "completion", "response"),
    "messages": ("messages",),
    "text": ("text",),
    "id": ("id",),
    "subject": ("subject", "author"),
    "paraphrase": ("paraphrased_answer",),
    "question_paraphrase": ("paraphrased_question",),
    "perturbed": ("perturbed_answer",),
    "alternatives": ("alternatives", "alternate"),
    "spans": ("spans",),
    "lead": ("lead",),
}
"""Column names of each role, in order of preference."""

_SURROGATE = re.compile("[\ud800-\udfff]")

OPTIONAL = ("id", "subject", "paraphrase", "question_paraphrase", "perturbed", "alternatives", "spans", "lead")
"""Roles that a row may lack."""

_SHAPES: tuple[tuple[str, ...], ...] = (("prompt", "answer"), ("messages",), ("text",))

SHAPES = "question+answer, prompt+completion, prompt+response, messages or text"
"""The shapes, as messages name them."""


def records_of(
    rows: Iterable[tuple[str, Mapping[str, Any]]], label: str, columns: Mapping[str, str] | None = None, cells: bool = False
) -> list[Record]:
    """Turn rows into records with unique ids.

    A record without an ``id`` column gets the first 12 hexadecimal digits of the SHA-256 of its prompt, messages and answer;
    exact repeats get ``-2``, ``-3``, ... So the same fact has the same id in every file.

    Args:
        rows: pairs of place ("line 3") and row.
        label: the source's name in messages.
        columns: role to column name, for files with other names: ``{"prompt": "q", "answer": "a"}``; a role may be given by
            its own name or by one of its usual column names.
        cells: whether values are CSV cells, in which a list is written as a JSON array and an empty cell is no value.

    Raises:
        InputError: there are no rows, the columns fit no shape, or a row's value is missing, empty or of the wrong type.
    """
    mapping: dict[str, str] | None = None
    records: list[Record] = []
    taken: dict[str, str] = {}
    for where, row in rows:
        if mapping is None:
            mapping = resolve(row.keys(), label, columns)
        reader = _RowReader(f"{label} {where}", row, mapping, cells)
        draft = reader.record()
        if not reader.has_id:
            record = dataclasses.replace(draft, id=next(i for i in _repeats(draft.id) if i not in taken))
        elif draft.id in taken:
            raise InputError(
                f"The id {draft.id!r} occurs twice in {label}: {taken[draft.id]} and {where}.", "Make the ids unique."
            )
        else:
            record = draft
        taken[record.id] = where
        records.append(record)
    if not records:
        raise InputError(f"{label} holds no records.", f"Give at least one row of {SHAPES}.")
    return records


def resolve(found: Iterable[str], label: str, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Role to column: the shape's roles, and those that were named; optional columns are looked up in every row.

    Raises:
        InputError: a named role or column does not exist, or no shape fits.
    """
    names = list(found)
    chosen: dict[str, str] = {}
    for key, column in (columns or {}).items():
        role = next((r for r, aliases in ALIASES.items() if key == r or key in aliases), None)
        if role is None:
            raise unknown("column role", key, ALIASES)
        if column not in names:
            raise InputError(f"{label} has no column {column!r}; it has {_quoted(names)}.", _nearest_column([column], names))
        chosen[role] = column
    if len({shape for shape in _SHAPES if any(part in chosen for part in shape)}) > 1:
        raise InputError(f"The columns named for {label} belong to different shapes.", f"Choose one of {SHAPES}.")
    usual = {role: next((a for a in aliases if a in names), None) for role, aliases in ALIASES.items()}
    shape = _shape(chosen, usual)
    if shape is None:
        wanted = [alias for role in ("prompt", "answer", "messages", "text") for alias in ALIASES[role]]
        raise InputError(
            f"{label} has the columns {_quoted(names)}; expected {SHAPES}.",
            f"{_nearest_column(names, wanted)} Rename them, or say which is which: --column prompt=NAME --column answer=NAME "
            "(in Python columns={...}).".strip(),
        )
    return {**{part: usual_column for part in shape if (usual_column := usual[part])}, **chosen}


def _shape(chosen: Mapping[str, str], usual: Mapping[str, str | None]) -> tuple[str, ...] | None:
    named = [shape for shape in _SHAPES if any(role in chosen for role in shape)]
    fits = [shape for shape in named or _SHAPES if all(chosen.get(role) or usual[role] for role in shape)]
    return fits[0] if fits else None


def _quoted(names: Iterable[str]) -> str:
    listed = [repr(n) for n in names]
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "") if listed else "none"


def _nearest_column(given: Iterable[str], known: list[str]) -> str:
    near = [(g, close[0]) for g in given if (close := nearest(g.strip().lower(), known, n=1))]
    return " ".join(f"{g!r} looks like {k!r}." for g, k in near[:3])


def _repeats(name: str) -> Iterator[str]:
    yield name
    count = 2
    while True:
        yield f"{name}-{count}"
        count += 1


def row_of(record: Record) -> dict[str, Any]:
    """A record as the row of a file, from which :func:`records_of` makes it again (rows of one file are of one shape)."""
    row: dict[str, Any] = {"id": record.id}
    if record.messages:
        turns = [*record.messages, ("assistant", record.answer)]
        row["messages"] = [{"role": role, "content": text} for role, text in turns]
    elif record.is_text:
        row["text"] = record.answer
    else:
        row |= {"prompt": record.prompt, "completion" if record.verbatim else "answer": record.answer}
    more = {
        role: getattr(record, role)
        for role in ("subject", "paraphrase", "question_paraphrase", "perturbed", "alternatives", "lead")
    }
    return row | {ALIASES[role][0]: list(v) if isinstance(v, tuple) else v for role, v in more.items() if v}


def content_id(prompt: str, messages: tuple[tuple[str, str], ...], answer: str) -> str:
    """The id of a record whose source gives none: 12 hexadecimal digits."""
    text = json.dumps([prompt, messages, answer], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _RowReader:
    """Reads one row's values, and says where it is when one of them is wrong."""

    def __init__(self, where: str, row: Mapping[str, Any], mapping: Mapping[str, str], cells: bool) -> None:
        self.where, self.row, self.cells = where, row, cells
        optional = {role: next((a for a in ALIASES[role] if a in row), "") for role in OPTIONAL if role not in mapping}
        self.mapping = {**mapping, **{role: column for role, column in optional.items() if column}}
        self.has_id = "id" in self.mapping

    def record(self) -> Record:
        prompt, messages = "", ()  # type: tuple[str, tuple[tuple[str, str], ...]]
        if "messages" in self.mapping:
            messages, answer = self._messages()
        elif "text" in self.mapping:
            answer = self._required("text")
        else:
            prompt, answer = self._required("prompt"), self._required("answer")
        return Record(
            id=self._id() if self.has_id else content_id(prompt, messages, answer),
            answer=answer,
            prompt=prompt,
            messages=messages,
            subject=self._name("subject"),
            paraphrase=self._optional("paraphrase"),
            question_paraphrase=self._optional("question_paraphrase"),
            perturbed=self._list("perturbed"),
            alternatives=self._list("alternatives"),
            verbatim=self.mapping.get("answer") == "completion" and not messages,
            spans=self._spans(answer),
            lead=self._optional("lead"),
        )

    def _value(self, role: str) -> Any:
        value = self.row.get(self.mapping[role]) if role in self.mapping else None
        return None if self.cells and value == "" else value

    def _error(self, role: str, problem: str, remedy: str) -> InputError:
        return InputError(f"{self.where}: {self.mapping[role]!r} {problem}.", remedy)

    def _text(self, role: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(role, f"must be text; got {_type_name(value)}", "Write it in quotes.")
        if not value.isascii() and _SURROGATE.search(value):
            raise self._error(
                role, "holds half of a surrogate pair, which no tokenizer can read", "Repair the escape \\uD8xx or \\uDCxx."
            )
        return value

    def _required(self, role: str) -> str:
        if self.mapping[role] not in self.row:
            raise InputError(
                f"{self.where} has no {self.mapping[role]!r}; it has {_quoted(self.row)}.", "Every row needs the same columns."
            )
        value = self._value(role)
        if value is None:
            raise self._error(role, "is empty", "Fill it in, or leave the row out.")
        text = self._text(role, value)
        if not text.strip():
            remedy = "Fill it in, or leave the row out."
            raise self._error(
                role, "is empty", remedy if role != "prompt" else "Fill it in, or give plain text as the column 'text'."
            )
        return text

    def _optional(self, role: str) -> str:
        value = self._value(role)
        return "" if value is None else self._text(role, value)

    def _name(self, role: str) -> str:
        value = self._value(role)
        if value is None:
            return ""
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(role, value)

    def _id(self) -> str:
        name = self._name("id")
        if not name:
            raise self._error("id", "is empty", "Give every row an id, or none.")
        return name

    def _json_cell(self, role: str, value: Any) -> Any:
        if not (self.cells and isinstance(value, str) and value.lstrip().startswith("[")):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise self._error(role, "begins with '[' but is no JSON array", 'Write ["one", "two"].') from None

    def _list(self, role: str) -> tuple[str, ...]:
        value = self._json_cell(role, self._value(role))
        if value is None:
            return ()
        if not isinstance(value, (str, list, tuple)):
            raise self._error(role, f"must be text or a list of texts; got {_type_name(value)}", 'Write ["one", "two"].')
        texts = tuple(self._text(role, v) for v in ([value] if isinstance(value, str) else value))
        if any(not text.strip() for text in texts):
            raise self._error(role, "holds an empty text", "Leave it out of the list.")
        return texts

    def _spans(self, answer: str) -> tuple[Span, ...]:
        value = self._json_cell("spans", self._value("spans"))
        if value is None:
            return ()
        example = 'Write [[3, 9]] or [{"start": 3, "end": 9}], characters of the answer with the end left out.'
        if not isinstance(value, (list, tuple)):
            raise self._error("spans", f"must be a list of spans; got {_type_name(value)}", example)
        found: list[Span] = []
        for item in value:
            pair = (item.get("start"), item.get("end")) if isinstance(item, Mapping) else item
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(n) is int for n in pair):
                raise self._error("spans", f"holds {item!r}, which is no pair of whole numbers", example)
            found.append((int(pair[0]), int(pair[1])))
        check_spans(found, answer, f"{self.where}: {self.mapping['spans']!r}")
        return joined(found)

    def _messages(self) -> tuple[tuple[tuple[str, str], ...], str]:
        role = "messages"
        turns = self._json_cell(role, self._value(role))
        example = 'Write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
        if not isinstance(turns, (list, tuple)) or not turns:
            raise self._error(role, f"must be a list of turns; got {_type_name(turns)}", example)
        pairs = []
        for number, turn in enumerate(turns, start=1):
            speaker, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
            if not isinstance(speaker, str) or not speaker or not isinstance(content, str):
                raise self._error(role, f"has no role and content as text in turn {number}", example)
            pairs.append((speaker, self._text(role, content)))
        if pairs[-1][0] != "assistant":
            raise self._error(
                role,
                f"ends with a turn of {pairs[-1][0]!r}",
                "The last turn must be the assistant's: it is what is learnt or forgotten.",
            )
        if not pairs[-1][1].strip():
            raise self._error(role, "ends with an empty turn", "Fill it in, or leave the row out.")
        if len(pairs) == 1:
            raise self._error(
                role, "has only the assistant's turn", "Give the turn before it, or plain text as the column 'text'."
            )
        return tuple(pairs[:-1]), pairs[-1][1]


def _type_name(value: Any) -> str:
    names = {type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    return names.get(type(value), type(value).__name__)
