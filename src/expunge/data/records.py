"""Records with stable identity: what a request names, a split holds and an audit scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, overload

from typing_extensions import TypeVar

from expunge.core.files import digest_json


class Item(Protocol):
    """What every kind of record has: a text (:class:`Record`), a row of a table (:class:`~expunge.data.rows.Row`)."""

    @property
    def id(self) -> str:
        """Stable name within its source."""

    @property
    def cluster(self) -> str:
        """The independent unit it belongs to."""

    def content(self) -> dict[str, object]:
        """What it says, without its id: the basis of content hashes."""


T = TypeVar("T", bound=Item, default="Record")


@dataclass(frozen=True, slots=True)
class Record:
    """One example of text.

    Exactly one of three shapes: question and answer (``prompt`` + ``answer``), chat (``messages`` + ``answer``; messages are
    the turns before the answer, as pairs of role and content), or plain text (``prompt`` empty, ``answer`` the text). Only
    the answer is ever supervised.

    Attributes:
        id: stable name of the record within its source: given by the data, or derived from the content.
        answer: the text to be learnt or forgotten; never empty.
        prompt: what comes before the answer; empty for plain text.
        messages: earlier chat turns ((role, content), ...); empty unless the source has chat messages.
        subject: the independent unit the record belongs to (person, author, book); intervals resample subjects. Empty: itself.
        paraphrase: the answer in other words (TOFU: ``paraphrased_answer``); empty if unknown.
        perturbed: wrong answers of the same form (TOFU: ``perturbed_answer``).
        question_paraphrase: the prompt in other words.
        alternatives: answers that the user wants instead (AltPO, DPO); none by default.
        verbatim: prompt and answer are parts of one text (prompt + completion) and joined as they are, without a template.
        spans: parts of the answer that are treated otherwise than the rest (a password in code, a name in a letter): pairs of
            first character and the one after the last, in order and apart from each other; see :mod:`expunge.data.spans`.
        lead: how the answer is made to begin ("Answer:"): it stands before the answer, belongs to what is given, and is neither
            learnt nor scored; empty for most.
    """

    id: str
    answer: str
    prompt: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    subject: str = ""
    paraphrase: str = ""
    perturbed: tuple[str, ...] = ()
    question_paraphrase: str = ""
    alternatives: tuple[str, ...] = ()
    verbatim: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    lead: str = ""

    @property
    def cluster(self) -> str:
        """The independent unit: the subject, or the record itself."""
        return self.subject or self.id

    @property
    def is_text(self) -> bool:
        """Whether this is plain text without a prompt."""
        return not self.prompt and not self.messages

    def content(self) -> dict[str, object]:
        """What the record says, without its id: the basis of content hashes."""
        return {
            "prompt": self.prompt,
            "messages": [list(m) for m in self.messages],
            "answer": self.answer,
            "paraphrase": self.paraphrase,
            "perturbed": list(self.perturbed),
            "question_paraphrase": self.question_paraphrase,
            "alternatives": list(self.alternatives),
            "subject": self.subject,
            **({"verbatim": True} if self.verbatim else {}),
            **({"spans": [list(s) for s in self.spans]} if self.spans else {}),
            **({"lead": self.lead} if self.lead else {}),
        }


def content_key(record: Record) -> str:
    """Identity of what a record says (prompt, turns, answer), whatever file or id it came under: 16 hex digits."""
    return digest_json([record.prompt, [list(m) for m in record.messages], record.answer])[:16]


@dataclass(frozen=True)
class RecordSet(Sequence[T], Generic[T]):
    """A named, ordered, immutable set of records with unique ids.

    Attributes:
        name: for people ("forget", "tofu:forget10").
        records: in the order of the source.
        source: where it came from, for the manifest ("people.jsonl", "tofu:forget10", "python").
    """

    name: str
    records: tuple[T, ...]
    source: str = field(default="python", compare=False)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> RecordSet[T]: ...
    def __getitem__(self, index: int | slice) -> T | RecordSet[T]:
        if isinstance(index, slice):
            return RecordSet(self.name, self.records[index], self.source)
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[T]:
        return iter(self.records)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and contents in order; the name and the source do not count."""
        return digest_json([{"id": r.id, **r.content()} for r in self.records])

    def clusters(self) -> list[str]:
        """The cluster of each record, in order."""
        return [r.cluster for r in self.records]
