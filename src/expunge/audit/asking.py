"""Asking a model something else than what its records ask: prompts of several turns, answers whose beginning is forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expunge.adapters.base import Adapter, Example
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.audit.evidence import Evidence
from expunge.audit.facts import question_of
from expunge.audit.generations import cut, shorten
from expunge.core.errors import InputError
from expunge.data.records import Record

STOPS = ("\nQuestion:",)  #: where a model that was trained on blocks of questions goes on to the next one


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        record: whose prompt, or chat, is sent; its answer is ignored.
        begin: how the answer is made to begin; the model goes on from there.
        of: the record whose fact an answer is rated by; none: the one that is sent. A question that is written otherwise gives
            away other words than the record's own.
    """

    record: Record
    begin: str = ""
    of: Record | None = None


def asking(record: Record, text: str) -> Record:
    """A record that asks ``text`` instead, in the same place."""
    if record.messages:
        return replace(record, messages=(*record.messages[:-1], (record.messages[-1][0], text)))
    return replace(record, prompt=text)


def prefixed(record: Record, prefix: str) -> Record:
    """A record whose question, or last turn of a chat, begins with ``prefix``."""
    return asking(record, prefix + question_of(record))


def after(record: Record, turns: Sequence[tuple[str, str]]) -> Record:
    """A record as a chat in which ``turns`` (pairs of role and text) come before it."""
    own = record.messages or (("user", record.prompt),)
    return replace(record, prompt="", messages=(*turns, *own), verbatim=False)


def is_chat(adapter: Adapter) -> bool:
    """Whether the model's prompts go through a chat template of its tokenizer."""
    return bool(getattr(adapter, "templated", False))


def fitted(adapter: Adapter, record: Record) -> Record:
    """The record as the adapter can encode it: a chat of several turns as one text, where there is no chat template.

    What the system says stands before everything; solved questions are written in the adapter's own template, a blank line after
    each.
    """
    turns = record.messages
    if len(turns) < 2 or is_chat(adapter):
        return record
    template = str(getattr(adapter, "template", None) or DEFAULT_TEMPLATE)
    opening, rest = template.split("{prompt}")
    between, closing = rest.split("{answer}")
    parts = [text + "\n\n" for role, text in turns if role == "system"]
    spoken = [(role, text) for role, text in turns if role != "system"]
    for i, (role, text) in enumerate(spoken):
        if role == "assistant":
            parts.append(text + closing + "\n\n")
        else:
            parts.append(opening + text + (between if _answered(spoken, i) else "\n\n"))
    text = "".join(parts)
    at = len(text.rstrip(" "))
    return replace(record, prompt=text[:at], messages=(), verbatim=True, answer=text[at:] + record.answer, spans=())


def _answered(turns: Sequence[tuple[str, str]], i: int) -> bool:
    return i + 1 == len(turns) or turns[i + 1][0] == "assistant"


def encoded(adapter: Adapter, ask: Ask, suffix: str = "") -> Example:
    """The example whose prompt a model is to continue.

    Raises:
        InputError: it does not fit into the model's context, or the chat template refuses it.
    """
    record = ask.record
    if not ask.begin:
        return adapter.encode(fitted(adapter, record), suffix=suffix)
    forced = adapter.encode(fitted(adapter, replace(record, answer=ask.begin, spans=())), suffix=suffix)
    return adapter.resumed(forced, len(adapter.spoken(forced)))


def told(
    evidence: Evidence,
    label: str,
    name: str,
    asks: Sequence[Ask | None],
    limit: int,
    *,
    style: str,
    suffix: str,
    stops: Sequence[str] = STOPS,
) -> list[str | None]:
    """A model's greedy answers to prompts, one per place; nothing where there is no prompt, or one that the model cannot take.

    Args:
        evidence, label, name: which model is asked; the set is named for messages.
        asks: the prompts; their records have different ids.
        limit: longest answer in tokens; at most what the audit lets a model write.
        style: unlike that of any other prompts on the set.
        suffix: marks the ids of the examples.
        stops: the answer ends before any of these texts.
    """

    def make(adapter: Adapter) -> list[Example]:
        out = []
        for ask in asks:
            if ask is None:
                continue
            try:
                out.append(encoded(adapter, ask, suffix))
            except InputError as error:
                evidence.miss(f"Not every prompt of {suffix.strip('#')} could be asked on the {name} set: {error.message}")
        return out

    made = evidence.generations(label, name, style, make, min(limit, evidence.protocol.max_new_tokens))
    texts = {g.id: cut(shorten(evidence.decoder(label), g, limit).text, stops) for g in made}
    return [None if ask is None else texts.get(ask.record.id + suffix) for ask in asks]
