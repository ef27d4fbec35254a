"""PISTOL: contracts between companies and people, the edges of a graph, by Qiu, Shen, Chen et al. (2024, arXiv 2406.16810).

A file is a list of questions, each with the edge that it is about: ``{"question": ..., "answer": ..., "edge": "A_B"}``. An edge
joins two entities, whose names are what stands before and after its ``_``. A request names edges; what is kept falls into edges
that share an entity with a forgotten one (*connected*) and those that do not (*apart*). Any graph of
facts in this schema is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from expunge.core.errors import InputError, unknown
from expunge.data.named import DATASETS, NamedSet
from expunge.data.records import Record, RecordSet
from expunge.data.schema import Column, checked, published_rows

HUB = "xinchiqiu/PISTOL"
_QUESTION = (Column("question"), Column("answer"))
_HOMES = ("pistol", "PISTOL", "PISTOL/data", "data")


@DATASETS.register("pistol")
class Pistol(NamedSet):
    """PISTOL's questions about the edges of a graph of contracts (arXiv 2406.16810)."""

    name: ClassVar[str] = "pistol"
    folder: str = Field("", description="folder that holds sample_data_1.json and factual_data.json")
    sample: str = Field("1", description="which graph: NAME of sample_data_NAME.json; published: 1, 2")
    edges: str = Field("A_B", description="the edges to forget, with commas")

    def configurations(self) -> dict[str, str]:
        """What is forgotten, what is kept, and the parts of it."""
        return {
            "forget": "questions about the edges to forget",
            "retain": "questions about all other edges",
            "connected": "kept edges that share an entity with a forgotten one",
            "apart": "kept edges that share none",
            "facts": "questions on general knowledge",
        }

    def load(self, configuration: str) -> RecordSet:
        """The records of one part; subjects are the edges.

        Raises:
            InputError: a file is not there or does not fit the schema, an edge is unknown, or the part is empty.
        """
        if configuration == "facts":
            label, rows = published_rows(self.folder, _HOMES, ("factual_data",), None, "pistol:facts")
            found = [_record(row, f"pistol-fact-{i:03d}", "") for i, (_, row) in enumerate(checked(rows, _QUESTION, label))]
        else:
            chosen = self._parts()[configuration]
            found = [_record(row, f"pistol-{e}-{i:03d}", e) for e in chosen for i, row in enumerate(self._edges[e])]
        if not found:
            raise InputError(f"The graph has no edge for pistol:{configuration}.", f"Forget other edges than {self.edges}.")
        return RecordSet(f"pistol:{configuration}", tuple(found), f"pistol:{configuration}")

    @cached_property
    def _edges(self) -> Mapping[str, list[Mapping[str, Any]]]:
        hub = (HUB, f"pistol_data_{self.sample}", "train")
        label, rows = published_rows(self.folder, _HOMES, (f"sample_data_{self.sample}",), hub, f"pistol {self.sample}")
        out: dict[str, list[Mapping[str, Any]]] = {}
        for where, row in checked(rows, (*_QUESTION, Column("edge")), label):
            ends = row["edge"].split("_")
            if len(ends) != 2 or not all(ends):
                raise InputError(f"{label} {where}: the edge {row['edge']!r} does not join two entities.", "Write it as A_B.")
            out.setdefault(row["edge"], []).append(row)
        return out

    def _parts(self) -> dict[str, list[str]]:
        """The edges of each part, in the order of the file."""
        wanted = [e.strip() for e in self.edges.split(",") if e.strip()]
        for edge in wanted or [self.edges]:
            if edge not in self._edges:
                raise unknown("edge", edge, self._edges)
        touched = {end for e in wanted for end in e.split("_")}
        kept = [e for e in self._edges if e not in wanted]
        near = [e for e in kept if touched & set(e.split("_"))]
        return {"forget": wanted, "retain": kept, "connected": near, "apart": [e for e in kept if e not in near]}


def _record(row: Mapping[str, Any], name: str, edge: str) -> Record:
    return Record(id=name, prompt=row["question"].strip(), answer=row["answer"].strip(), subject=edge)
