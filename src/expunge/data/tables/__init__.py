"""Tables of rows from files, folders of images, and what other libraries hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from expunge.core.errors import InputError
from expunge.data.rows import Table, Task
from expunge.data.tables.bunch import is_bunch, read_bunch
from expunge.data.tables.columns import Tokenizer, read_columns
from expunge.data.tables.frames import frame_of
from expunge.data.tables.idx import is_idx, read_idx
from expunge.data.tables.pictures import read_folder
from expunge.data.tables.settings import Reading

__all__ = ["Reading", "read", "read_table"]


def read_table(
    source: Any,
    *,
    target: str | None = None,
    id: str | None = None,
    subject: str | None = None,
    features: str | Sequence[str] | None = None,
    image: str | None = None,
    text: str | None = None,
    tokenizer: Tokenizer | None = None,
    columns: str | Sequence[str] | None = None,
    task: Task = "classification",
    classes: Sequence[str] | None = None,
    folder: str | Path | None = None,
    size: int | tuple[int, int] | None = None,
    grayscale: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_length: int | None = None,
    precision: Literal["float32", "float64"] = "float32",
) -> Table:
    """Read the rows that a classifier or a regressor learns from.

    >>> read_table("patients.csv", target="diagnosis", id="case", subject="patient", columns=["ward"])
    >>> read_table("photos", size=32)                                    # photos/cat/1.jpg, photos/dog/7.jpg, ...
    >>> read_table("photos/labels.csv", image="file", target="age", task="regression", size=(64, 48))
    >>> read_table("reviews.jsonl", text="review", target="stars", tokenizer=tokenizer)

    Each row is read once and written into one array. Class labels that are whole numbers, also as text, count from 0; other
    labels are names, sorted unless ``classes`` gives their order. Inputs are as they are in the source: nothing is scaled but
    pictures. Numbers become ``[n, features]``, a single column of arrays ``[n, ...]``, pictures ``[n, channels, height, width]``
    in [0, 1], texts token ids ``[n, longest]`` with -1 behind the end of a text.

    Args:
        source: a CSV, JSON, JSON Lines or Parquet file; an ``.npz`` archive; a folder that holds a folder of images for each
            class; the images of MNIST and its kin (``train-images-idx3-ubyte.gz``, with the labels beside them); a
            ``datasets.Dataset``; a ``pandas.DataFrame``; a scikit-learn ``Bunch``; a mapping from names to arrays; or a list of
            mappings.
        target: column to predict; folders and Bunches know it.
        id: column of unique names. Without one the path of an image, or the number of the row, counted from 0, is its name.
        subject: column of the independent units (persons, patients, devices); an empty cell stands for the row itself.
        features: columns that the model reads, in this order; none: all that have no other part. They must be numbers.
        image: column of images: paths, encoded pictures, pixels as bytes ``[height, width]`` or with channels behind, or what
            ``datasets`` decodes.
        text: column of texts.
        tokenizer: of the model; for texts.
        columns: columns that are kept for conditions only; of named features, or an image or text column, all others are.
            Targets, subjects, and features that are one number each can be used in conditions without being named here.
        task: classification or regression.
        classes: names of the classes in the order of the model's outputs; a class may then have no row.
        folder: where the paths of images begin; none: beside the file.
        size: height and width that images are resized to; one number for a square. None: all must have one size.
        grayscale: one channel instead of three.
        mean, std: of each channel, subtracted and divided by.
        max_length: most tokens of a text, the rest is cut; none: the tokenizer's own limit.
        precision: of inputs that are no token ids, and of the targets of a regression.

    Raises:
        InputError: something is missing, repeated, out of range or unreadable: the message names file, column and row.
        MissingExtra: a format needs a package that is not installed.
    """
    how = Reading(
        target=target, id=id, subject=subject, features=features, image=image, text=text, columns=columns, task=task,
        classes=classes, folder=folder, size=size, grayscale=grayscale, mean=mean, std=std, max_length=max_length,
        precision=precision,
    )  # fmt: skip
    return read(source, how, tokenizer)


def read(source: Any, how: Reading, tokenizer: Tokenizer | None = None) -> Table:
    """:func:`read_table` with its options as settings, as a configuration file or a command line gives them.

    Raises:
        InputError, MissingExtra: see :func:`read_table`.
    """
    if isinstance(source, str) and not source:
        raise InputError("The name of the data is empty.", "Name a file or a folder.")
    if tokenizer is not None and how.text is None:
        raise InputError("A tokenizer is given, but no column of texts.", "Name it: text=COLUMN.")
    if isinstance(source, (str, Path)) and is_idx(Path(source)):
        return read_idx(Path(source), how)
    if how.image is None and not (isinstance(source, (str, Path)) and Path(source).is_dir()):
        for name in ("folder", "size", "grayscale", "mean", "std"):
            if getattr(how, name):
                raise InputError(f"{name} speaks of images, but no column of images is named.", "Name it: image=COLUMN.")
    if how.max_length is not None and how.text is None:
        raise InputError("max_length speaks of texts, but no column of texts is named.", "Name it: text=COLUMN.")
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return read_folder(Path(source), how)
    if isinstance(source, Mapping) and is_bunch(source):
        return read_bunch(source, how)
    return read_columns(frame_of(source), how, tokenizer)
