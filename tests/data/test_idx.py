"""Images of MNIST's format, and real images of three kinds."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pandas
import PIL.Image
import pytest
from sklearn.linear_model import LogisticRegression

from expunge.core.errors import InputError
from expunge.data.tables import read_table
from expunge.data.tables.idx import idx_array

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 2], dtype=np.uint8)


def written(folder: Path, images=IMAGES, labels=LABELS, *, packed: bool = False) -> Path:
    for name, array in (("t-images-idx3-ubyte", images), ("t-labels-idx1-ubyte", labels)):
        held = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(held) if packed else held)
    return folder / ("t-images-idx3-ubyte" + ".gz" * packed)


@pytest.mark.parametrize("packed", [False, True])
def test_images_and_their_labels(tmp_path: Path, packed: bool) -> None:
    made = read_table(written(tmp_path, packed=packed))
    np.testing.assert_allclose(made.inputs, IMAGES[:, None] / 255, atol=1e-7)
    assert made.targets.tolist() == LABELS.tolist()
    assert made.ids == tuple("0123456")
    small = read_table(written(tmp_path, packed=packed), size=2, mean=[0.5], std=[0.5], classes=["a", "b", "c", "d"])
    assert small.inputs.shape == (7, 1, 2, 2)
    assert -1 <= small.inputs.min() < 0
    assert small.classes == ("a", "b", "c", "d")


def damage(path: Path, what: str) -> None:
    labels = path.with_name("t-labels-idx1-ubyte")
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "magic":
        path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])
    elif what == "head":
        path.write_bytes(path.read_bytes()[:6])
    elif what == "labels":
        labels.unlink()
    elif what == "fewer":
        written(path.parent, labels=LABELS[:5])
    elif what == "range":
        written(path.parent, labels=LABELS + 1)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", "announces"),
        ("magic", "no idx file"),
        ("head", "announces"),
        ("labels", "t-labels-idx1-ubyte beside"),
        ("fewer", "7 images and t-labels-idx1-ubyte 5 labels"),
        ("range", "no row of the class 0"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, what: str, said: str) -> None:
    path = written(tmp_path)
    damage(path, what)
    with pytest.raises(InputError, match=said):
        read_table(path)


def test_what_is_not_there_or_not_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        read_table(tmp_path / "x-images-idx3-ubyte.gz")
    path = written(tmp_path, packed=True)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be unpacked"):
        read_table(path)
    with pytest.raises(InputError, match="subject names a column"):
        read_table(path, subject="x")


def learnable(data) -> float:
    """Accuracy of a linear model on the second half of a shuffled thousand."""
    order = np.random.default_rng(0).permutation(len(data))[:1000]
    x, y = data.inputs[order].reshape(len(order), -1), data.targets[order]
    half = len(order) // 2
    return float(LogisticRegression(max_iter=100).fit(x[:half], y[:half]).score(x[half:], y[half:]))


@pytest.mark.shared_data
def test_mnist(shared_data: Path) -> None:
    made = read_table(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    assert made.inputs.shape == (10_000, 1, 28, 28)
    assert np.bincount(made.targets).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert made.targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert (made.inputs.min(), made.inputs.max()) == (0, 1)
    assert learnable(made) > 0.8
    assert len(made.select(classes=["3"])) == 1010
    assert len(idx_array(shared_data / "fashion-mnist-sample" / "train-labels-idx1-ubyte.gz", 1)) == 60_000


@pytest.mark.shared_data
def test_fashion_sample_as_a_table_of_paths(shared_data: Path, tmp_path: Path) -> None:
    with PIL.Image.open(shared_data / "fashion-mnist-sample" / "fashion-mnist-sprite.png") as sprite:
        tiles = np.asarray(sprite.convert("RGB"))[..., 0].reshape(30, 28, 30, 28).swapaxes(1, 2)
    rows = []
    for row in range(30):
        for column in range(30):
            name = f"{row:02d}-{column:02d}.png"
            PIL.Image.fromarray(tiles[row, column]).save(tmp_path / name)
            rows.append({"file": name, "kind": row // 3, "column": column})
    pandas.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    made = read_table(tmp_path / "labels.csv", image="file", target="kind", grayscale=True)
    assert np.array_equal(np.round(made.inputs[:, 0] * 255), tiles.reshape(900, 28, 28))
    assert np.bincount(made.targets).tolist() == [90] * 10
    assert len(made.select(where="column < 3 and target == '9'")) == 9
    assert learnable(made) > 0.65


@pytest.mark.shared_data
def test_cifar_as_a_folder_for_each_class(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "cifar10-jpeg" / "test_10000.tar.gz") as archive:
        some = [m for m in archive if Path(m.name).stem < "0150"]
        archive.extractall(tmp_path, some, filter="data")
    made = read_table(tmp_path / "test")
    assert made.inputs.shape == (1500, 3, 32, 32)
    assert made.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(made.targets).tolist() == [150] * 10
    assert made.ids[0] == "airplane/0000.jpg"
    assert 0 <= made.inputs.min() < made.inputs.max() <= 1
    assert learnable(made) > 0.2
    assert len(read_table(tmp_path / "test", size=16, grayscale=True).emptied(made.select(classes=["frog"]))) == 1
