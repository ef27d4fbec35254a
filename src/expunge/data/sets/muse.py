"""MUSE: news articles and books, by Shi, Lee, Huang et al. (2024, arXiv 2407.06460).

Configurations are ``<corpus>-<part>``. The layout of the authors' repository (``bbc/knowmem/forget_qa.json``) and of the hub
data sets muse-bench/MUSE-News and MUSE-Books is read, and the flat one with the folders in the file name
(``bbc_knowmem_forget_qa.json``). The texts are other people's: they are read from where the user has them, and never passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.named import DATASETS, NamedSet
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, published_rows

CORPORA = {"news": ("bbc", "muse-bench/MUSE-News"), "books": ("hp", "muse-bench/MUSE-Books")}
_TEXT = (Column("text"),)
_PASSAGE = (Column("prompt"), Column("gt"))
_QUESTION = (Column("question"), Column("answer"))


@dataclass(frozen=True)
class _Part:
    """One file: its folder, its possible names, its schema."""

    text: str
    folder: str
    names: tuple[str, ...]
    columns: tuple[Column, ...] = _TEXT


def _parts() -> dict[str, _Part]:
    raw = {
        "forget": "to forget", "retain1": "to keep: regulariser of unlearning", "retain2": "to keep: for evaluation",
        "holdout": "never trained on",
    }  # fmt: skip
    parts = {name: _Part(f"whole documents {text}", "raw", (name,)) for name, text in raw.items()}
    parts["verbmem"] = _Part("passages of the forget set with their true continuation", "verbmem", ("forget",), _PASSAGE)
    for side, names in (("forget", ("forget_qa",)), ("retain", ("retain2_qa", "retain_qa"))):
        parts[f"knowmem-{side}"] = _Part(f"questions about the {side} documents", "knowmem", names, _QUESTION)
        icl = tuple(f"{n}_icl" for n in names)
        parts[f"knowmem-{side}-solved"] = _Part(f"solved questions before those about {side}", "knowmem", icl, _QUESTION)
    for side, names in (("forget", ("forget",)), ("retain", ("retain2", "retain")), ("holdout", ("holdout",))):
        parts[f"privleak-{side}"] = _Part(f"texts of the {side} set, for membership", "privleak", names)
    for k in range(1, 5):
        parts[f"scal-{k}"] = _Part(f"forget set {k} of four nested ones", "scal", (f"forget_{k}",))
        parts[f"sust-{k}"] = _Part(f"forget set {k} of four disjoint ones", "sust", (f"forget_{k}",))
    return parts


PARTS = _parts()


@DATASETS.register("muse")
class Muse(NamedSet):
    r"""MUSE's texts, passages and questions, for News and Books (arXiv 2407.06460).

    A question is asked as MUSE asks it: after ``shots`` solved ones, as ``Question: q\nAnswer: a`` blocks.
    """

    name: ClassVar[str] = "muse"
    folder: str = Field("", description="folder that holds the files of the corpus, or of both")
    shots: int = Field(10, ge=0, description="solved questions before each question")
    space: Literal["prompt", "answer"] = Field(
        "prompt", description="where the space before an answer belongs: to the prompt, as published, or to the answer"
    )
    words: int = Field(
        0, ge=0, description="cut documents into pieces of at most so many words; 0: whole (published: pieces of 2,048 tokens)"
    )

    def configurations(self) -> dict[str, str]:
        """Each part of each corpus."""
        return {f"{corpus}-{name}": part.text for corpus in CORPORA for name, part in PARTS.items()}

    def load(self, configuration: str) -> RecordSet:
        """The records of one part.

        Raises:
            InputError: the file is not there or does not fit the schema, or there are fewer solved questions than asked for.
        """
        corpus, _, name = configuration.partition("-")
        part = PARTS[name]
        prefix = f"muse-{configuration}"
        rows = list(self._rows(corpus, part))
        if part.columns is _TEXT:
            cut = self.words if part.folder in ("raw", "scal", "sust") else 0
            records = [r for i, row in enumerate(rows) for r in _pieces(row["text"], f"{prefix}-{i:04d}", cut)]
        elif part.columns is _PASSAGE:
            records = [
                Record(id=f"{prefix}-{i:04d}", prompt=row["prompt"], answer=row["gt"], verbatim=True)
                for i, row in enumerate(rows)
            ]
        else:
            records = self._questions(corpus, name, rows, prefix)
        return RecordSet(f"muse:{configuration}", tuple(records), f"muse:{configuration}")

    def _rows(self, corpus: str, part: _Part) -> Iterator[Mapping[str, Any]]:
        short, hub = CORPORA[corpus]
        names = [f"{f}/{n}" for n in part.names for f in (f"{short}/{part.folder}", f"{corpus}/{part.folder}", part.folder)]
        names += [f"{f}_{part.folder}_{n}" for n in part.names for f in (short, corpus)]
        hub_name = "retain" + part.names[0].removeprefix("retain2") if part.folder != "raw" else part.names[0]
        split = hub_name if part.names[0].startswith("retain2") else part.names[0]
        label, rows = published_rows(self.folder, ("muse", "muse_bench/data"), names, (hub, part.folder, split), f"muse:{corpus}")
        return (row for _, row in checked(rows, part.columns, label))

    def _questions(self, corpus: str, name: str, rows: Sequence[Mapping[str, Any]], prefix: str) -> list[Record]:
        blocks = ""
        if self.shots and not name.endswith("-solved"):
            solved = list(self._rows(corpus, PARTS[f"{name}-solved"]))
            if len(solved) < self.shots:
                raise InputError(
                    f"muse:{corpus}-{name} has {len(solved)} solved questions, not {self.shots}.",
                    f"Ask with shots={len(solved)}.",
                )
            blocks = "".join(f"Question: {s['question']}\nAnswer: {s['answer']}\n\n" for s in solved[: self.shots])
        before, after = (" ", "") if self.space == "prompt" else ("", " ")
        return [
            Record(
                id=f"{prefix}-{i:04d}", prompt=f"{blocks}Question: {row['question']}\nAnswer:{before}",
                answer=after + row["answer"], verbatim=True,
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip


def _pieces(text: str, name: str, words: int) -> list[Record]:
    """A document, or its pieces of at most ``words`` words; the pieces of a document are one subject."""
    if not words:
        return [Record(id=name, answer=text, subject=name)]
    starts = [i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())]
    bounds = [*starts[::words], len(text)]
    cut = [text[a:b].rstrip() for a, b in pairwise(bounds)]
    return [Record(id=f"{name}-{k:02d}", answer=piece, subject=name) for k, piece in enumerate(cut) if len(piece.split()) > 1]
