"""Data and networks of :mod:`experiments.rows_small`: MNIST and CIFAR-10 as tables, and small networks of our own."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.data.rows import Table
from expunge.data.tables import read_table
from expunge.engine.members import Training
from expunge.pipeline.supervised import Supervised


class Residual(nn.Module):
    """Two 3 x 3 convolutions with group normalisation beside a shortcut (He et al. 2016, arXiv 1512.03385).

    Group instead of batch normalisation: rows of a batch stay apart, so many models can be trained at once.

    Args:
        inner: channels that come in.
        outer: channels that go out.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(4, outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(4, outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if stride > 1 or inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inner, H, W]`` to ``[B, outer, H / stride, W / stride]``."""
        held = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(held)) + self.shortcut(x))


def convolutional() -> nn.Module:
    """For images of 1 x 28 x 28: two convolutions of stride 2 and two linear layers, 26,698 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def residual() -> nn.Module:
    """For images of 3 x 32 x 32: a stem of 4 x 4 patches, residual blocks of 16 and 32 channels, one linear layer; 25,082."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.GroupNorm(4, 16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A data set and what learns it.

    Attributes:
        title: for people.
        read: from the folder of the data, a folder for what is unpacked and the numbers of rows wanted, to the tables of training
            and of unseen rows.
        build: the untrained network.
        training: how it is trained.
        gone: the class to forget in the class-wise request.
    """

    title: str
    read: Callable[[Path, Path, tuple[int, int]], tuple[Table, Table]]
    build: Callable[[], nn.Module]
    training: Training
    gone: str


def unpack(archive: Path, folder: Path, each: int) -> Path:
    """Unpack the first files of every folder of a tar archive into a new folder, which is complete or not there.

    No member may leave the folder, be a device or a link to elsewhere.

    Args:
        archive: of a layout like ``train/dog/0000.jpg``.
        folder: becomes ``folder/train/dog/0000.jpg``.
        each: files of each folder at most, the first by name.

    Raises:
        InputError: the archive cannot be read, or a member would leave the folder.
    """
    if folder.is_dir():
        return folder
    try:
        with atomic_path(folder) as temporary, tarfile.open(archive) as held:
            temporary.mkdir()
            by_folder: dict[str, list[tarfile.TarInfo]] = {}
            for member in held:
                if not member.isdir():
                    by_folder.setdefault(member.name.rpartition("/")[0], []).append(member)
            chosen = [m for found in by_folder.values() for m in sorted(found, key=lambda m: m.name)[:each]]
            held.extractall(temporary, members=sorted(chosen, key=lambda m: m.offset), filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{archive.name} cannot be unpacked: {error}.", "Fetch it again, from a source you trust.") from None
    return folder


def _mnist(folder: Path, scratch: Path, rows: tuple[int, int]) -> tuple[Table, Table]:
    train, unseen = (read_table(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    return train, unseen


def _cifar(folder: Path, scratch: Path, rows: tuple[int, int]) -> tuple[Table, Table]:
    """Folders of images by class, ``train/`` and ``test/``, as they are or in archives ``train*.tar.gz``, ``test*.tar.gz``."""
    found = []
    for part, count in zip(("train", "test"), rows, strict=True):
        place = folder / part
        if not place.is_dir():
            archives = sorted(folder.glob(f"{part}*.tar.gz"))
            if not archives:
                raise InputError(f"{folder} holds neither {part}/ nor {part}*.tar.gz.", "Give the folder of CIFAR-10's images.")
            each = -(-count // 10)
            place = unpack(archives[0], scratch / f"{part}-{each}", each) / part
        found.append(read_table(place))
    return found[0], found[1]


SOURCES: Mapping[str, Source] = {
    "mnist": Source("MNIST", _mnist, convolutional, Training(steps=700, batch=32, lr=4e-3, decay="linear"), "3"),
    "cifar10": Source("CIFAR-10 (JPEG)", _cifar, residual, Training(steps=320, batch=32, lr=5e-3, decay="linear"), "dog"),
}


def problem(source: Source, folder: Path, scratch: Path, rows: int, unseen: int) -> Supervised:
    """Rows drawn at random with a fixed seed, some to train on and some that are never seen, with the network.

    Args:
        source: which data.
        folder: where they are.
        scratch: folder for what is unpacked.
        rows, unseen: how many of each; all, where there are fewer.

    Raises:
        InputError: the data are missing or malformed.
    """
    parts, wholes = [], source.read(folder, scratch, (rows, unseen))
    for name, count, whole in zip(("train", "test"), (rows, unseen), wholes, strict=True):
        chosen = np.sort(np.random.default_rng(0).permutation(len(whole))[:count])
        part = whole.subset(chosen)
        parts.append(dataclasses.replace(part, ids=tuple(f"{name}/{i}" for i in part.ids)))
    made = Supervised(data=parts[0], holdout=parts[1], build=source.build, training=source.training)
    made.check()
    return made
