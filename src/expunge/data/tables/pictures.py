"""Pictures as arrays of channels in [0, 1], each decoded once, written into one array."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, MissingExtra
from expunge.data.rows import Table, table
from expunge.data.tables.buffers import Filling
from expunge.data.tables.settings import Reading

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
"""Files that are taken for pictures when a folder is read."""
_BLOCK = 1024  #: pictures that are converted at once


class Pictures:
    """Pictures ``[n, channels, height, width]`` in the order in which they come.

    Values are divided by the largest one that the picture's type allows, so they lie in [0, 1]; mean and standard deviation
    follow. Pictures of palettes and with transparency are converted to plain colours; of several frames the first is read; a
    rotation noted in the file is not applied.

    Args:
        reading: size, channels and normalisation.
        expected: how many will come, if known.
    """

    def __init__(self, reading: Reading, expected: int | None = None) -> None:
        try:
            import PIL.Image
        except ImportError:
            raise MissingExtra("Reading images", "images") from None
        self._library: Any = PIL.Image
        self._reading, self._held = reading, Filling(reading.precision, expected)
        self._first = ""
        self._mean, self._std = (self._per_channel(name) for name in ("mean", "std"))

    def add(self, source: Any, name: str) -> None:
        """Decode one picture.

        Args:
            source: a path, the bytes of a file, an opened picture, or bytes ``[height, width]``, or with channels behind.
            name: what it is called in messages.

        Raises:
            InputError: it cannot be read, or differs in size from the first and no size was asked for.
        """
        pixels = self._decode(source, name)
        shape = self._held.shape
        if shape is None:
            self._first = name
        elif pixels.shape != shape:
            sizes = [f"{s[1]} x {s[2]} pixels" for s in (shape, pixels.shape)]
            raise InputError(f"{self._first} has {sizes[0]} and {name} {sizes[1]} (height x width).", "Give a size: size=32.")
        self._held.add(pixels[None])

    def add_gray(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Pictures of one channel as bytes ``[n, height, width]``, at once where they need not be resized."""
        if self._reading.size not in (None, pixels.shape[1:]):
            for number, picture in enumerate(pixels):
                self.add(picture, str(number))
            return
        for start in range(0, len(pixels), _BLOCK):
            block = pixels[start : start + _BLOCK, None].astype(self._reading.precision) / 255
            self._held.add(self._normalised(block))

    def done(self) -> npt.NDArray[Any]:
        """All pictures."""
        return self._held.done()

    def _per_channel(self, name: str) -> npt.NDArray[Any] | None:
        values, channels = getattr(self._reading, name), 1 if self._reading.grayscale else 3
        if values is not None and len(values) != channels:
            raise InputError(f"{name} has {len(values)} values and an image {channels} channels.", "Give one for each.")
        return None if values is None else np.reshape(values, (channels, 1, 1)).astype(self._reading.precision)

    def picture(self, pixels: npt.NDArray[np.uint8]) -> Any:
        """An opened picture of bytes ``[height, width]``, or with channels behind."""
        return self._library.fromarray(pixels)

    def _decode(self, source: Any, name: str) -> npt.NDArray[Any]:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,), (4,)):
                found = f"{source.dtype} of the shape {list(source.shape)}"
                raise InputError(f"The image {name} is {found}.", "Give bytes: [height, width], or with 3 or 4 channels behind.")
            source = self.picture(source)
        if not isinstance(source, (bytes, Path)) and not hasattr(source, "convert"):
            raise InputError(f"The image {name} is of type {type(source).__name__}.", "Give paths, encoded images or pixels.")
        try:
            if hasattr(source, "convert"):
                return self._pixels(source, name)
            with warnings.catch_warnings():
                warnings.simplefilter("error", self._library.DecompressionBombWarning)
                with self._library.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                    return self._pixels(opened, name)
        except (OSError, SyntaxError, ValueError, TypeError, AttributeError) as error:
            known = str(error) and type(error).__name__ != "UnidentifiedImageError"
            reason = str(error).splitlines()[0].rstrip(".") if known else "it is in no known format"
            raise InputError(f"The image {name} cannot be read: {reason}.", "Write it again, or leave it out.") from None
        except (self._library.DecompressionBombError, self._library.DecompressionBombWarning):
            raise InputError(f"The image {name} has too many pixels.", "Make it smaller, or leave it out.") from None

    def _pixels(self, picture: Any, name: str) -> npt.NDArray[Any]:
        how = self._reading
        deep = picture.mode.startswith("I;16")
        if picture.mode in ("I", "F"):
            raise InputError(
                f"The image {name} has pixels of type {picture.mode}, without a range.", "Write it with 8 or 16 bits."
            )
        if not deep:
            picture = picture.convert("L" if how.grayscale else "RGB")
        if how.size is not None and (picture.height, picture.width) != how.size:
            picture = picture.resize((how.size[1], how.size[0]), self._library.Resampling.BILINEAR)
        pixels = np.asarray(picture, dtype=how.precision) / (65535 if deep else 255)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if deep and not how.grayscale:
            pixels = np.repeat(pixels, 3, axis=0)
        return self._normalised(pixels)

    def _normalised(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._mean is not None:
            pixels = pixels - self._mean
        return pixels if self._std is None else pixels / self._std


def locate(folder: Path | None, name: str, where: str) -> Path:
    """The file of a path that a table names, below ``folder``.

    Raises:
        InputError: the path leaves the folder, directly or over a link, or nothing is there.
    """
    if folder is None:
        raise InputError(f"Nothing says where the image {name!r} of {where} lies.", "Give the folder that holds the images.")
    path = folder / name
    root = os.path.realpath(folder)
    try:
        real = os.path.realpath(path)
        there = path.is_file()
    except (ValueError, OSError):  # no name that the file system knows
        real, there = root, False
    if os.path.commonpath([root, real]) != root:
        raise InputError(f"The path {name!r} of {where} leaves the folder {folder}.", "Name files below it.")
    if not there:
        raise InputError(
            f"There is no image {name!r} in {folder}, which {where} names.", "Correct the path, or leave the row out."
        )
    return path


def read_folder(folder: Path, reading: Reading) -> Table:
    """Pictures in one folder for each class; the ids are paths below ``folder``, with slashes.

    Raises:
        InputError: the folder or a class is empty, a picture lies in no class, or one cannot be read.
    """
    check_parts(reading, "A folder of images")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
    if loose:
        raise InputError(
            f"The image {loose[0]} lies in {folder} itself, in the folder of no class.",
            "Put images into one folder for each class, or read a table that names them: image=COLUMN, target=COLUMN.",
        )
    if not names:
        raise InputError(f"The folder {folder} holds no images.", "Give one with a folder of images for each class.")
    if reading.classes is not None and (odd := next((n for n in names if n not in reading.classes), None)) is not None:
        raise InputError(f"The folder {odd!r} in {folder} is none of the classes.", f"The classes: {', '.join(reading.classes)}.")
    files = {name: files_in(folder / name) for name in names}
    empty = next((name for name in names if not files[name]), None)
    if empty is not None:
        raise InputError(
            f"The folder of the class {empty!r} in {folder} holds no images.",
            f"Fill or remove it; images end in {', '.join(sorted(SUFFIXES))}.",
        )
    pictures = Pictures(reading, sum(map(len, files.values())))
    paths, owners = [p for name in names for p in files[name]], [name for name in names for _ in files[name]]
    ids = [p.relative_to(folder).as_posix() for p in paths]
    for path, id_ in zip(paths, ids, strict=True):
        pictures.add(path, id_)
    return table(
        pictures.done(), owners, ids=ids, classes=reading.classes or names, precision=reading.precision, source=str(folder)
    )


def files_in(folder: Path) -> Sequence[Path]:
    """The pictures below a folder, sorted by path; names that begin with a dot are left out."""
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(at, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    return sorted(found, key=lambda p: p.as_posix())


def check_parts(reading: Reading, what: str) -> None:
    """Refuse settings that speak of columns, where there are none.

    Raises:
        InputError: there is one.
    """
    if reading.task != "classification":
        raise InputError(
            f"No numbers can be predicted from this: {what[0].lower()}{what[1:]}.",
            "Give a table of paths and numbers: image=COLUMN, target=COLUMN.",
        )
    for part in ("target", "id", "subject", "features", "image", "text", "columns", "folder"):
        if getattr(reading, part) is not None:
            raise InputError(
                f"{part} names a column, but there are none: {what[0].lower()}{what[1:]}.",
                "Give a table of paths instead, such as a CSV file beside the images.",
            )
