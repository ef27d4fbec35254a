"""From records to token ids: chat templates, the boundary between prompt and answer, the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.spans import Span, check_spans, moved

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer: {answer}"

# Some chat templates write today's date into the system turn; a fixed one keeps token ids, and with them every cached
# result, the same from one day to the next.
_TEMPLATE_DATE = "26 Jul 2024"
_ANCHORS = ("\n", ".")  #: texts after which a vocabulary that begins every text with a space adds none


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the language adapter keeps of a record.

    Attributes:
        ids: the whole sequence, int32 ``[size]``.
        start: first supervised position, at least 1; ``ids[:start]`` is the prompt, ``ids[start:]`` are the targets.
        ends: whether the last target is an end token (of the text or of the turn).
        marked: which targets lie, if only in part, in a span of the record, bool ``[size - start]``; none: no target does.
        favoured: which lie in a span that is to be said, likewise.
    """

    ids: NDArray[np.int32]
    start: int
    ends: bool
    marked: NDArray[np.bool_] | None = None
    favoured: NDArray[np.bool_] | None = None


def check_template(template: str) -> None:
    """Refuse a template without its two places.

    Raises:
        InputError: ``{answer}`` or ``{prompt}`` is missing, occurs twice, or the answer comes first.
    """
    once = template.count("{answer}") == template.count("{prompt}") == 1
    if not once or template.index("{answer}") < template.index("{prompt}"):
        raise InputError(
            f"The template {template!r} must contain {{prompt}} once and, after it, {{answer}} once.",
            f"For example {DEFAULT_TEMPLATE!r}.",
        )


class Encoder:
    r"""Turns prompts and answers into token ids such that the prompt's ids are the same with and without the answer.

    Records with a prompt go through the tokenizer's chat template when it has one (and ``template`` is none), else through
    ``template``. The space between a template's prompt and its answer belongs to the answer, as most vocabularies have it.
    The joint tokenisation is used when it starts with the prompt's own ids; otherwise a token crosses the boundary, and
    the prompt's ids are followed by the answer's own ids (counted in :attr:`repairs`).

    Args:
        tokenizer: a transformers tokenizer.
        template: text with ``{prompt}`` and ``{answer}``; none: the chat template, or :data:`DEFAULT_TEMPLATE`.
        max_length: longest sequence in tokens; none: no limit.
        truncate: cut the end of what is longer instead of refusing it.
    """

    def __init__(self, tokenizer: Any, template: str | None, max_length: int | None, truncate: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = template is None and bool(getattr(tokenizer, "chat_template", None))
        self.template = template or DEFAULT_TEMPLATE
        check_template(self.template)
        self.max_length = max_length
        self.truncate = truncate
        self.repairs = 0
        self.prefix = self._prefix()
        special = {int(i) for i in getattr(tokenizer, "all_special_ids", []) if i is not None}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = special | {int(i) for i, token in added.items() if getattr(token, "special", False)}

    def encode(self, record: Record, answer: str | None = None, prompt: str | None = None) -> Tokens:
        """The tokens of a record, with another answer or prompt where given.

        Plain text has no prompt: all but its first token are targets, and no end token is added (texts are often cut from
        longer ones).

        The record's spans are those of its own answer: another one has none.

        Raises:
            InputError: too long for the context, nothing to supervise, no end token, a chat that cannot be rendered, or a span
                outside of the answer.
        """
        spans = record.spans if answer is None else ()
        answer = record.answer if answer is None else answer
        check_spans(spans, answer, f"Record {record.id!r}")
        if record.is_text and prompt is None:
            own = self.spell(answer)
            ids, start, ends = self.prefix + own, 1, False
            marks = [False] * len(self.prefix) + (self._marks("", answer, own, spans) if spans else [])
        else:
            head, tail, prefix = self._texts(record, record.lead + answer, prompt)
            if record.lead:
                at = tail.find(record.lead) + len(record.lead)
                head, tail = head + tail[:at], tail[at:]
            before, after = self._split(head, tail, prefix)
            marks = [False] * len(before) + (self._marks(head, tail, after, moved(spans, answer, tail)) if spans else [])
            after, ends = self._end(after)
            ids, start = before + after, len(before)
        if self.max_length is not None and len(ids) > self.max_length:
            ids, ends = self._shorten(record, ids, start), False
        if len(ids) <= start or start < 1:
            raise InputError(
                f"Record {record.id!r} has no token to supervise: {answer[:40]!r} becomes {len(ids)} token(s).",
                "Give it a longer text, or a prompt.",
            )
        marked = np.zeros(len(ids), dtype=np.bool_)
        marked[: len(marks)] = marks[: len(ids)]
        return Tokens(np.asarray(ids, dtype=np.int32), start, ends, marked[start:] if marked[start:].any() else None)

    def opening(self, record: Record, prompt: str | None = None) -> str:
        """The text before a record's answer, as a model is given it to go on from; nothing of plain text.

        Raises:
            InputError: a chat that cannot be rendered.
        """
        if record.is_text and prompt is None:
            return ""
        head, tail, _ = self._texts(record, record.lead + record.answer, prompt)
        return head + tail[: tail.find(record.lead) + len(record.lead)] if record.lead else head

    def answered(self, tokens: Tokens, answer: str) -> Tokens:
        """The same prompt with another answer, where the record is not at hand; it ends as the old answer did.

        The white space between prompt and answer is that of the old one. Longer than the context: the end is cut off.

        Raises:
            InputError: the answer has no token.
        """
        before, after = tokens.ids[: tokens.start].tolist(), tokens.ids[tokens.start :].tolist()
        lead = self._text([*before, *after]).removeprefix(self._text(before))
        space = lead[: len(lead) - len(lead.lstrip())]
        own = self._apart(before, space + answer)
        if not own:
            raise InputError(f"The answer {answer[:40]!r} has no token.", "Give a longer one.")
        return self.spliced(tokens, [*own, *(after[-1:] if tokens.ends else [])], tokens.ends)

    def spliced(self, tokens: Tokens, answer: Sequence[int], ends: bool) -> Tokens:
        """The same prompt with the ids of another answer, cut to the context."""
        ids = np.asarray([*tokens.ids[: tokens.start].tolist(), *answer], dtype=np.int32)
        cut = self.max_length is not None and len(ids) > self.max_length
        return Tokens(ids[: self.max_length] if cut else ids, tokens.start, ends and not cut)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def end_ids(self) -> list[int]:
        """Ids that end a generation: the tokenizer's end token and, for chats, the template's end of turn."""
        found = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        if self.chat:
            try:
                last = self.encode(Record(id="probe", prompt="a", answer="b"))
            except InputError:  # a template with stricter rules than one user turn; its records will say so themselves
                return found
            if last.ends:
                found.append(int(last.ids[-1]))
        return sorted(set(found))

    def spell(self, text: str) -> list[int]:
        """Ids of a text as it is, with nothing put before it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _marks(self, head: str, tail: str, ids: Sequence[int], spans: Sequence[Span]) -> list[bool]:
        """Which of the ids that stand for ``tail`` overlap one of its ``spans``.

        The ids come from one of several tokenisations (:meth:`_split`); the one that ends with them tells their characters.
        """
        for lead in (head, "", *_ANCHORS):
            found = self._placed(lead + tail)
            if [i for i, _ in found[-len(ids) :]] == list(ids):
                places = [(a - len(lead), b - len(lead)) for _, (a, b) in found[-len(ids) :]]
                return [any(a < end and b > start for start, end in spans) for a, b in places]
        raise InputError(
            f"It cannot be told which tokens stand for which characters of {tail[:40]!r}.", "Leave its spans out, or change it."
        )

    def _placed(self, text: str) -> list[tuple[int, Span]]:
        """Ids of a text, each with the characters that it stands for."""
        try:
            found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise InputError(
                "The tokenizer does not say which characters a token stands for, so spans cannot be marked.",
                "Use its fast version (AutoTokenizer gives it where there is one).",
            ) from None
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text (a begin token, or nothing)."""
        bare, full = self.spell("a"), list(self.tokenizer("a", verbose=False)["input_ids"])
        for i in range(len(full) - len(bare) + 1):
            if full[i : i + len(bare)] == bare:
                return full[:i]
        return []

    def _texts(self, record: Record, answer: str, prompt: str | None) -> tuple[str, str, list[int]]:
        """Text before the answer, text from the answer on, and ids before both."""
        if record.verbatim and not record.messages:
            return (record.prompt if prompt is None else prompt), answer, self.prefix
        if self.chat:
            return (*self._render(record, answer, prompt), [])
        text = single_turn(record) if prompt is None else prompt
        # Filled in one go: a prompt that itself contains "{answer}" must stay as it is.
        before, rest = self.template.split("{prompt}")
        between, after = rest.split("{answer}")
        head, tail = before + text + between, answer + after
        cut = len(head.rstrip(" "))
        return head[:cut], head[cut:] + tail, self.prefix

    def _render(self, record: Record, answer: str, prompt: str | None) -> tuple[str, str]:
        """Both halves of a chat; what a template writes between the turn's opening and the answer counts as prompt."""
        turns = [{"role": role, "content": text} for role, text in record.messages or (("user", record.prompt),)]
        if prompt is not None:
            users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            turns[users[-1] if users else -1] = {"role": "user", "content": prompt}
        options = {"tokenize": False, "date_string": _TEMPLATE_DATE}
        try:
            full = self.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], **options)
            opening = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        except Exception as error:  # templates are programs of their own and raise what they like
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"The chat template refuses record {record.id!r}: {reason}.",
                "Change its turns, or give a template such as " + repr(DEFAULT_TEMPLATE) + ".",
            ) from error
        at = full.find(answer, len(opening)) if full.startswith(opening) else full.rfind(answer)
        if at < 0:  # templates that trim the answer
            answer = answer.strip()
            at = full.find(answer, len(opening)) if full.startswith(opening) else full.rfind(answer)
        if at < 0 or not answer:
            raise InputError(
                f"The chat template does not write out the answer of record {record.id!r}.",
                "Give a template such as " + repr(DEFAULT_TEMPLATE) + ".",
            )
        return full[:at], full[at:]

    def _split(self, head: str, tail: str, prefix: list[int]) -> tuple[list[int], list[int]]:
        before = prefix + self.spell(head)
        joint = prefix + self.spell(head + tail)
        if joint[: len(before)] == before and len(joint) > len(before) and before:
            return before, joint[len(before) :]
        if not before:  # an empty prompt without a begin token: the first token has nothing to be predicted from
            return joint[:1], joint[1:]
        self.repairs += 1
        return before, self._apart(before, tail)

    def _apart(self, before: Sequence[int], tail: str) -> list[int]:
        """The answer's own ids. Vocabularies that begin every text with a space mark would add one: an anchor avoids it."""
        text = self.tokenizer.decode(list(before), clean_up_tokenization_spaces=False) + tail
        own = self.spell(tail)
        for candidate in (own, *self._anchored(tail)):
            if self.tokenizer.decode([*before, *candidate], clean_up_tokenization_spaces=False) == text:
                return candidate
        return own

    def _anchored(self, tail: str) -> list[list[int]]:
        out = []
        for anchor in _ANCHORS:
            mark, both = self.spell(anchor), self.spell(anchor + tail)
            if both[: len(mark)] == mark and len(both) > len(mark):
                out.append(both[len(mark) :])
        return out

    def _end(self, ids: list[int]) -> tuple[list[int], bool]:
        """The answer up to its end token, which is added if the template has none; nothing after it can be generated."""
        last = max((i for i, token in enumerate(ids) if token in self._special), default=-1)
        if last >= 0 and not self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1], True
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end token, so the end of an answer could be neither learnt nor generated.",
                "Set one: tokenizer.eos_token = '<a token of its vocabulary>'.",
            )
        return [*ids, int(self.tokenizer.eos_token_id)], True

    def _shorten(self, record: Record, ids: list[int], start: int) -> list[int]:
        limit = self.max_length
        assert limit is not None
        if not self.truncate:
            raise InputError(
                f"Record {record.id!r} has {len(ids)} tokens; the model's context holds {limit}.",
                "Split or shorten it, or have it cut: text.truncate=true (in Python truncate=True).",
            )
        if start >= limit:
            raise InputError(
                f"The prompt of record {record.id!r} alone has {start} tokens; the model's context holds {limit}, "
                "so truncation leaves no answer.",
                "Shorten the prompt.",
            )
        return ids[:limit]


def single_turn(record: Record) -> str:
    """The prompt of a record that a plain template can hold: chats only with one user turn and nothing before it."""
    if not record.messages:
        return record.prompt
    if len(record.messages) == 1 and record.messages[0][0] == "user":
        return record.messages[0][1]
    raise InputError(
        f"Record {record.id!r} is a chat of {len(record.messages)} turns, but there is no chat template to write it with.",
        "Use a tokenizer with a chat template (set tokenizer.chat_template), or give the data as question and answer.",
    )
