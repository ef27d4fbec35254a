"""Personal identities to be forgotten in faces: the data of MUFAC and MUCAC in the folders in which they are distributed.

What is forgotten is a person, and what is predicted is something else (an age group, a smile), so no class disappears. Source:
Choi and Na 2023, *Towards Machine Unlearning Benchmarks: Forgetting the Personal Identities in Facial Recognition Systems*,
arXiv 2311.02240. The metric is :func:`~expunge.audit.kernel.gaps.nomus`, with
:func:`~expunge.audit.kernel.membership.logistic_attack` on the losses of ``unseen`` and of the rows to forget.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from expunge.core.errors import InputError
from expunge.data.readers import rows_of
from expunge.data.rows import Indices, Table
from expunge.data.tables import read_table

AGES = ("0-6", "7-12", "13-19", "20-30", "31-45", "46-55", "56-66", "67-80")
"""Age groups of MUFAC, whose file names end in the letters a to h, in years."""
ATTRIBUTES = {"gender": "Male", "smiling": "Smiling", "young": "Young"}
"""What MUCAC predicts, each yes or no, and the attribute of CelebA that says it; the gender is that of being male."""

_GROUPS = "abcdefgh"
_MUFAC = {"train": ("custom_train_dataset.csv", "train_images"), "test": ("custom_val_dataset.csv", "val_images"),
          "unseen": ("custom_test_dataset.csv", "test_images")}  # fmt: skip
_HOUSEHOLD = re.compile(r"(F\d+)_")
_TEST, _FORGET, _RETAIN = 190, 1250, 4855  #: first identities behind the test, forget and retain persons of MUCAC

Row = dict[str, str | int]


@dataclass(frozen=True)
class Faces:
    """One benchmark; no person is in two of train, test and unseen, nor both among the rows to forget and the others.

    Attributes:
        train: what the original model learns from; subjects are persons (MUFAC: households).
        test: for the accuracy of the task.
        unseen: never trained on; non-members for the attack.
        forget: indices into ``train``.
        dropped: ids of images that were left out because an equal one comes before: of forget, retain, test, unseen.
    """

    train: Table
    test: Table
    unseen: Table
    forget: Indices
    dropped: tuple[str, ...] = ()

    @property
    def retain(self) -> Indices:
        """The rows of ``train`` that are kept."""
        return self.train.others(self.forget)


def read_mufac(folder: str | Path, *, size: int | None = 128, forget: int = 1500, deduplicate: bool = True) -> Faces:
    """MUFAC: photographs of Korean families, to be sorted into eight age groups.

    The folder holds ``custom_train_dataset.csv``, ``custom_val_dataset.csv`` (test) and ``custom_test_dataset.csv`` (unseen)
    with the columns ``image_path`` and ``age_class`` (a to h), and the images in ``train_images``, ``val_images`` and
    ``test_images``. File names begin with the household: ``F0001_AGE_D_18_a1.jpg``. The first 1,500 training images are to be
    forgotten; a household through which that cut would go is forgotten as a whole.

    A later study found equal images in several splits; they are left out unless ``deduplicate`` is off, as it is in the numbers
    of the paper.

    Args:
        folder: the unpacked data.
        size: height and width of the images; none: as they are (they are square, 128 pixels).
        forget: how many training images to forget.
        deduplicate: keep only the first of images whose pixels are equal.

    Raises:
        InputError: a file is missing or not as described; a household is in two splits; or nothing, or everything, is forgotten.
    """
    root = _root(folder)
    tables = {}
    for split, (listing, images) in _MUFAC.items():
        rows = list(_mufac_rows(root / listing, images))
        tables[split] = read_table(
            rows, image="file", target="age", subject="household", classes=AGES, columns=["group"], folder=root, size=size
        )
    owners = tables["train"].subjects
    if not 0 < forget < len(owners):
        raise InputError(f"{forget} of {len(owners)} training images cannot be forgotten.", "Leave some to keep.")
    first = set(owners[:forget])
    chosen = np.flatnonzero([owner in first for owner in owners])
    return _joined(tables["train"], tables["test"], tables["unseen"], chosen, deduplicate=deduplicate)


def read_mucac(
    folder: str | Path,
    *,
    label: Literal["gender", "smiling", "young"] = "smiling",
    size: int | None = 128,
    deduplicate: bool = True,
) -> Faces:
    """MUCAC: photographs of celebrities (CelebA-HQ with identities), of which one attribute is predicted.

    The folder holds ``CelebA-HQ-identity.txt`` (lines of image and identity), ``CelebA-HQ-attribute.txt`` (the number of images,
    the names of the attributes, then lines of image and 1 or -1 for each), and the images in ``CelebAMask-HQ/CelebA-HQ-img``.
    Persons below identity 190 are the test set, those below 1250 are to be forgotten, those below 4855 kept, all others unseen.
    All three attributes are columns, so that conditions can name them. The paper's task with three labels at once is not one
    that a row with one target can express.

    Args:
        folder: the unpacked data.
        label: what is predicted.
        size: height and width that images (of 1,024 pixels) are resized to; none: as they are.
        deduplicate: keep only the first of images whose pixels are equal.

    Raises:
        InputError: a file is missing or not as described, or a split has no image.
    """
    if label not in ATTRIBUTES:
        raise InputError(f"MUCAC has no label {label!r}.", f"Choose one of: {', '.join(ATTRIBUTES)}.")
    root = _root(folder)
    identities = dict(_pairs(root / "CelebA-HQ-identity.txt"))
    attributes = _attributes(root / "CelebA-HQ-attribute.txt")
    names = sorted(attributes.keys() & identities.keys(), key=lambda n: (len(n), n))
    lonely = sorted(attributes.keys() ^ identities.keys())
    if lonely:
        raise InputError(f"The image {lonely[0]} has no identity or no attributes.", "Take both lists from one source.")
    splits: dict[str, list[Row]] = {"test": [], "forget": [], "retain": [], "unseen": []}
    for name in names:
        person = identities[name]
        which = "test" if person < _TEST else "forget" if person < _FORGET else "retain" if person < _RETAIN else "unseen"
        splits[which].append(
            {"file": name, "person": str(person), **attributes[name], "answer": "yes" if attributes[name][label] else "no"}
        )
    empty = next((split for split, rows in splits.items() if not rows), None)
    if empty is not None:
        raise InputError(f"MUCAC has no image of a person for the split {empty!r}.", "Check the identities.")
    images = root / "CelebAMask-HQ" / "CelebA-HQ-img"
    tables = [
        read_table(
            rows, image="file", target="answer", subject="person", classes=["no", "yes"], columns=list(ATTRIBUTES), folder=images,
            size=size,
        )
        for rows in (splits["forget"] + splits["retain"], splits["test"], splits["unseen"])
    ]  # fmt: skip
    return _joined(tables[0], tables[1], tables[2], np.arange(len(splits["forget"])), deduplicate=deduplicate)


def _root(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"There is no folder {root}.", "Name the one into which the data were unpacked.")
    return root


def _mufac_rows(listing: Path, images: str) -> Iterator[Row]:
    for where, row in rows_of(listing):
        missing = next((c for c in ("image_path", "age_class") if c not in row), None)
        if missing is not None:
            raise InputError(f"{listing.name} has no column {missing!r}.", "Take the lists of MUFAC as they are.")
        name, group = str(row["image_path"]), str(row["age_class"])
        household = _HOUSEHOLD.match(name)
        if household is None:
            raise InputError(f"The image {name!r} in {listing.name} {where} names no household.", "Names begin like F0001_.")
        if len(group) != 1 or group not in _GROUPS:
            raise InputError(f"The age class {group!r} in {listing.name} {where} is none of a to h.", "Correct it.")
        yield {"file": f"{images}/{name}", "household": household[1], "age": AGES[_GROUPS.index(group)], "group": group}


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for number, words in _words(path):
        if len(words) != 2 or not words[1].isdigit():
            raise InputError(f"{path.name} line {number} is not an image and an identity.", "Write: 0.jpg 1812.")
        yield words[0], int(words[1])


def _attributes(path: Path) -> dict[str, Row]:
    lines = list(_words(path))
    names = lines[1][1] if len(lines) > 1 else []
    absent = next((a for a in ATTRIBUTES.values() if a not in names), None)
    if absent is not None:
        raise InputError(f"{path.name} names no attribute {absent!r} in its second line.", "Take the list of CelebA-HQ as it is.")
    found: dict[str, Row] = {}
    for number, words in lines[2:]:
        if len(words) != len(names) + 1 or set(words[1:]) - {"1", "-1"}:
            raise InputError(f"{path.name} line {number} is not an image and {len(names)} times 1 or -1.", "Correct it.")
        found[words[0]] = {ours: int(words[1 + names.index(theirs)] == "1") for ours, theirs in ATTRIBUTES.items()}
    return found


def _words(path: Path) -> Iterator[tuple[int, list[str]]]:
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "The folder must be the one into which the data were unpacked.")
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield number, line.split()


def _joined(train: Table, test: Table, unseen: Table, forget: Indices, *, deduplicate: bool) -> Faces:
    """Drop equal images, and check that persons are apart."""
    dropped: list[str] = []
    if deduplicate:
        seen: set[bytes] = set()
        order = [*forget.tolist(), *train.others(forget).tolist()]
        kept = np.sort(_first_of_each(train, order, seen, dropped))
        forget = np.flatnonzero(np.isin(kept, forget))
        if len(kept) < len(train):
            train = train.subset(kept)
        parts = []
        for part in (test, unseen):
            first = _first_of_each(part, range(len(part)), seen, dropped)
            parts.append(part if len(first) == len(part) else part.subset(first))
        test, unseen = parts
    people = {"train": set(train.subjects), "test": set(test.subjects), "unseen": set(unseen.subjects)}
    for one, other in (("train", "test"), ("train", "unseen"), ("test", "unseen")):
        if both := sorted(people[one] & people[other]):
            raise InputError(f"{both[0]} is in {one} and in {other}.", "Put all images of a person or household into one.")
    if len(forget) in (0, len(train)):
        raise InputError(f"{len(forget)} of {len(train)} training images would be forgotten.", "Leave some to keep.")
    return Faces(train, test, unseen, forget, tuple(dropped))


def _first_of_each(part: Table, order: Sequence[int], seen: set[bytes], dropped: list[str]) -> Indices:
    """Indices of the rows whose pixels are not among those seen, which they join."""
    kept = []
    for i in order:
        content = hashlib.sha256(np.ascontiguousarray(part.inputs[i]).tobytes()).digest()
        if content in seen:
            dropped.append(part.ids[i])
        else:
            seen.add(content)
            kept.append(i)
    return np.array(kept, dtype=np.int64)
