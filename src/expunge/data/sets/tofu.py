"""TOFU: fictitious authors, by Maini, Feng, Schwarzschild, Lipton and Kolter (2024, arXiv 2401.06121).

4,000 questions and answers about 200 authors, 20 consecutive rows an author; the forget sets are the last 1, 5 and 10 per
cent. Record ids and subjects are the same in every configuration: row 3,600 of ``full`` is ``tofu-3600`` of the author
``author-180`` in ``forget10`` and ``forget10_perturbed`` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.core.errors import InputError
from expunge.data.hub import hub_rows
from expunge.data.named import DATASETS, Companions, NamedSet, data_folder
from expunge.data.readers import rows_of
from expunge.data.records import RecordSet
from expunge.data.shapes import records_of

HUB = "locuslab/TOFU"
ROWS_PER_AUTHOR = 20


@dataclass(frozen=True)
class _Part:
    """One configuration: its rows, where they stand in the numbering of ``prefix``, and the size of a subject."""

    rows: int
    text: str
    first: int = 0
    prefix: str = "tofu"
    per_subject: int = ROWS_PER_AUTHOR


def _parts() -> dict[str, _Part]:
    parts = {"full": _Part(4000, "all 200 authors")}
    for share, rows in (("01", 40), ("05", 200), ("10", 400)):
        first, kept = 4000 - rows, f"{100 - int(share)}"
        parts[f"forget{share}"] = _Part(rows, f"the authors to forget: the last {int(share)} per cent", first)
        parts[f"retain{kept}"] = _Part(first, f"the other {kept} per cent")
        parts[f"forget{share}_perturbed"] = _Part(rows, f"forget{share} with paraphrased and wrong answers", first)
        parts[f"holdout{share}"] = _Part(rows, "authors that no model was trained on", 0, "tofu-holdout")
    parts["retain_perturbed"] = _Part(400, "the first 400 rows with paraphrased and wrong answers")
    for name, rows, text in (("real_authors", 100, "questions about real authors"), ("world_facts", 117, "general knowledge")):
        prefix = "tofu-" + name.replace("_", "-")
        parts[name] = _Part(rows, f"{text}, with options", 0, prefix, 1)
        parts[f"{name}_perturbed"] = _Part(rows, f"{text}, with three wrong answers", 0, prefix, 1)
    return parts


PARTS = _parts()


@DATASETS.register("tofu")
class Tofu(NamedSet):
    """TOFU: questions and answers about 200 fictitious authors (arXiv 2401.06121).

    The files are sought in the folder of the option, in the folder named by the environment variable ``EXPUNGE_DATA``, and then
    on the Hugging Face hub through its local cache.
    """

    name: ClassVar[str] = "tofu"
    folder: str = Field("", description="folder that holds forget10.json and the others (JSON Lines or JSON), as on the hub")
    size: Literal["published", "any"] = Field(
        "published",
        description="any: take a set of another size too (generated data of the same schema); its ids are then its own",
    )
    authors: int | None = Field(
        None, ge=1, description="only the first authors of the configuration, 20 rows each, for small models; none given: all"
    )

    def configurations(self) -> dict[str, str]:
        """The 15 published configurations and three hold-out splits."""
        return {name: part.text for name, part in PARTS.items()}

    def load(self, configuration: str) -> RecordSet:
        """The records of a configuration, with ids and subjects that agree across configurations.

        Raises:
            InputError: the files are neither here nor to be had, or are not the published ones; or ``authors`` asks for more
                authors than the configuration has, or it is not about authors.
        """
        part = PARTS[configuration]
        label = f"tofu:{configuration}"
        self._check_authors(part, label)
        records = records_of(_numbered(self._rows(configuration), part, label), label)
        if self.size == "published" and len(records) != part.rows:
            raise InputError(f"{label} has {len(records)} rows, the published one has {part.rows}.", "Fetch the file again.")
        kept = records if self.authors is None else records[: self.authors * part.per_subject]
        return RecordSet(label, tuple(kept), label)

    def _check_authors(self, part: _Part, label: str) -> None:
        if self.authors is None:
            return
        if part.per_subject != ROWS_PER_AUTHOR:
            raise InputError(f"{label} is not divided by author, so it has no first {self.authors}.", "Leave authors out.")
        held = part.rows // part.per_subject
        if self.authors > held:
            raise InputError(f"{label} has {held} authors, not {self.authors}.", f"Ask for authors from 1 to {held}.")

    def companions(self, configuration: str) -> Companions | None:
        """For ``forget01``, ``forget05`` and ``forget10`` (perturbed or not) the published companions.

        ``authors`` is about the forget set: it goes on to the forget set that is audited. The other companions are whole.
        """
        base = configuration.removesuffix("_perturbed")
        if not base.startswith("forget"):
            return None
        share = base.removeprefix("forget")
        retain = self._reference(f"retain{100 - int(share)}")
        audit = {"forget": f"{base}_perturbed", "retain": "retain_perturbed"}
        audit |= {role: f"{role}_perturbed" for role in ("real_authors", "world_facts")}
        return Companions(
            retain=retain,
            holdout=self._reference(f"holdout{share}"),
            train=(self._reference("full"),),
            retrain=(retain,),
            audit={role: self._reference(name, self.authors if role == "forget" else None) for role, name in audit.items()},
        )

    def _reference(self, configuration: str, authors: int | None = None) -> str:
        options = {"folder": self.folder, "size": "any" if self.size == "any" else "", "authors": authors}
        given = "&".join(f"{name}={value}" for name, value in options.items() if value)
        return f"tofu:{configuration}" + (f"?{given}" if given else "")

    def _rows(self, configuration: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.folder:
            folder = Path(self.folder).expanduser()
            path = find_file(folder, configuration)
            if path is None:
                raise InputError(f"{folder} holds no {configuration}.json of TOFU.", "Name the folder that holds TOFU's files.")
            return iter(rows_of(path))
        shared = data_folder()
        path = find_file(shared, configuration) if shared else None
        if path is not None:
            return iter(rows_of(path))
        call = f"import datasets; datasets.load_dataset('{HUB}', '{configuration}')"
        remedy = (
            f'Download it once with a connection (python -c "{call}"), '
            f"or put {configuration}.json of that data set in DIR/tofu and set EXPUNGE_DATA=DIR."
        )
        return hub_rows(HUB, configuration, "train", remedy)


def find_file(root: Path, configuration: str) -> Path | None:
    """The file of a configuration below ``root``: in it, in ``tofu/``, in ``locuslab/TOFU/`` or in a hub cache's snapshot."""
    cache = sorted(root.glob("datasets--locuslab--TOFU/snapshots/*"))
    for folder in (root, root / "tofu", root / "TOFU", root / "locuslab" / "TOFU", *cache):
        for suffix in (".json", ".jsonl", ".parquet", ".csv"):
            path = folder / f"{configuration}{suffix}"
            if path.is_file():
                return path
    return None


def _numbered(rows: Iterator[tuple[str, Mapping[str, Any]]], part: _Part, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, (where, row) in enumerate(rows):
        index = part.first + number
        values = dict(row)
        values["id"] = f"{part.prefix}-{index:04d}"
        if part.per_subject > 1:
            kind = "author" if part.prefix == "tofu" else "holdout-author"
            values["subject"] = f"{kind}-{index // part.per_subject:03d}"
        options = [row[key] for key in sorted(row) if key.startswith("option")]
        if options:
            if row.get("answer") not in options:
                raise InputError(f"{label} {where}: the answer is none of the options.", "Fetch the file again.")
            values["perturbed_answer"] = [option for option in options if option != row["answer"]]
        yield where, values
