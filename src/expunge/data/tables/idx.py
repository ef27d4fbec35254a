"""Images and labels in the idx format, in which MNIST and its kin are distributed."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.data.tables.pictures import Pictures, check_parts
from expunge.data.tables.settings import Reading
from expunge.data.tables.values import labels

_IMAGES = re.compile(r"(.*)-images[-.]idx3-ubyte(\.gz)?")
_BYTES = 0x08  #: the type code of unsigned bytes, the only one of images


def is_idx(path: Path) -> bool:
    """Whether a file is named like the images of MNIST: ``train-images-idx3-ubyte``, with or without ``.gz``."""
    return _IMAGES.fullmatch(path.name) is not None


def read_idx(path: Path, reading: Reading) -> Table:
    """Images of one channel, ``[n, 1, height, width]``, with the labels of the file beside them (``train-labels-idx1-ubyte``).

    The ids are the numbers of the images, from 0.

    Raises:
        InputError: a file is missing or malformed, or the two differ in length.
    """
    check_parts(reading, "Images in idx")
    images = idx_array(path, 3)
    beside = path.name.replace("-images", "-labels").replace("idx3", "idx1")
    names = (beside, beside.removesuffix(".gz"), f"{beside.removesuffix('.gz')}.gz")
    found = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if found is None:
        raise InputError(f"There is no file {beside} beside {path.name}.", "Put the labels into the same folder.")
    classes = idx_array(found, 1)
    if len(classes) != len(images):
        raise InputError(f"{path.name} holds {len(images)} images and {found.name} {len(classes)} labels.", "Take both of a set.")
    if not len(images):
        raise InputError(f"{path.name} holds no images.", "Give at least two.")
    how = Reading(**{**dict(reading), "grayscale": True})
    pictures = Pictures(how, len(images))
    pictures.add_gray(images)
    y = labels(classes.tolist(), how.classes, found.name, indices=True)
    return table(pictures.done(), y, classes=how.classes, precision=how.precision, source=path.name)


def idx_array(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The bytes of an idx file, in its shape.

    Raises:
        InputError: it is missing, no idx file of that many dimensions of unsigned bytes, or cut off.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.", "Correct the path.")
    try:
        held = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} cannot be unpacked: {error}.", "Fetch it again.") from None
    if held[:4] != bytes([0, 0, _BYTES, dimensions]):
        raise InputError(f"{path.name} is no idx file of {dimensions} dimensions of bytes.", "Give the file as it was.")
    begin = 4 + 4 * dimensions
    shape: tuple[int, ...] = struct.unpack(f">{dimensions}i", held[4:begin].ljust(4 * dimensions, b"\0"))
    if len(held) - begin != math.prod(shape):
        raise InputError(f"{path.name} does not hold the {list(shape)} bytes that it announces.", "Fetch it again.")
    return np.frombuffer(held, dtype=np.uint8, offset=begin).reshape(shape)
