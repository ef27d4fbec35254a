"""Tables of images: folders of classes, tables of paths, and pictures that other libraries hold."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pandas
import PIL.Image
import pytest

from expunge.core.errors import InputError
from expunge.data.tables import read_table

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
NAMES = ["cat/1.png", "cat/2.png", "dog/deep/9.png", "dog/1.png", "eel/x.PNG", "eel/y.png"]
ORDER = [0, 1, 3, 2, 4, 5]  # as sorted paths
CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, pixels in zip(NAMES, PIXELS, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / name)
    (folder / "cat" / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    return folder


def channels(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) / 255).transpose(0, 3, 1, 2)


def encoded(pixels: np.ndarray) -> bytes:
    held = io.BytesIO()
    PIL.Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def test_a_folder_for_each_class(photos: Path) -> None:
    made = read_table(photos)
    assert made.ids == tuple(NAMES[i] for i in ORDER)
    assert made.classes == CLASSES
    assert made.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.inputs.dtype == np.float32
    np.testing.assert_allclose(made.inputs, channels(PIXELS[ORDER]), atol=1e-7)
    assert made.select(classes=["dog"]).tolist() == [2, 3]
    wider = read_table(str(photos), classes=["zebra", "eel", "dog", "cat"])
    assert wider.targets.tolist() == [3, 3, 2, 2, 1, 1]


def test_gray_size_and_normalisation(photos: Path) -> None:
    gray = read_table(photos, grayscale=True).inputs
    expected = (PIXELS[ORDER] @ [0.299, 0.587, 0.114])[:, None] / 255
    assert gray.shape == (6, 1, 5, 4)
    assert np.abs(gray - expected).max() <= 1.01 / 255
    small = read_table(photos, size=(2, 3)).inputs
    assert small.shape == (6, 3, 2, 3)
    assert np.abs(small.mean(axis=(2, 3)) - channels(PIXELS[ORDER]).mean(axis=(2, 3))).max() < 0.15
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    scaled = read_table(photos, mean=mean, std=std).inputs
    back = scaled * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))
    np.testing.assert_allclose(back, channels(PIXELS[ORDER]), atol=1e-6)


def test_sixteen_bits_palettes_and_transparency(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    deep = np.array([[0, 65535], [32768, 257]], dtype=np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "a" / "1.png")
    PIL.Image.fromarray(np.full((2, 2, 3), 51, np.uint8)).quantize(4).save(tmp_path / "a" / "2.png")
    PIL.Image.fromarray(np.full((2, 2, 4), 102, np.uint8)).save(tmp_path / "a" / "3.png")
    made = read_table(tmp_path, classes=["a", "b"]).inputs
    np.testing.assert_allclose(made[0], np.repeat(deep[None] / 65535, 3, axis=0), atol=1e-6)
    assert np.unique(made[1]).tolist() == pytest.approx([0.2])
    assert np.unique(made[2]).tolist() == pytest.approx([0.4])


def test_a_table_names_the_images(photos: Path, tmp_path: Path) -> None:
    rows = pandas.DataFrame({"file": NAMES, "age": range(6), "who": list("ppqqrr"), "kind": [n[:3] for n in NAMES]})
    rows["number"] = [f"n{i}" for i in range(6)]
    rows.to_csv(photos / "labels.csv", index=False)
    made = read_table(photos / "labels.csv", image="file", target="kind", subject="who")
    assert made.ids == tuple(NAMES)
    assert made.classes == CLASSES
    np.testing.assert_allclose(made.inputs, channels(PIXELS), atol=1e-7)
    assert made.select(where="age >= 4 or who == 'p'").tolist() == [0, 1, 4, 5]
    assert made.select(subjects=["q"]).tolist() == [2, 3]
    rows.to_parquet(tmp_path / "elsewhere.parquet")
    other = read_table(tmp_path / "elsewhere.parquet", image="file", target="age", task="regression", folder=photos, id="number")
    assert other.ids == tuple(rows["number"])
    assert other.targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(other.inputs, made.inputs)


def test_pictures_of_datasets_and_of_parquet(photos: Path, tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)), "age": datasets.Value("int32")}
    )
    values = {
        "image": [{"bytes": encoded(p), "path": "one-name.png"} for p in PIXELS],
        "label": [0, 0, 1, 1, 2, 2],
        "age": list(range(6)),
    }
    held = datasets.Dataset.from_dict(values, features)
    held.to_parquet(str(tmp_path / "d.parquet"))
    made = read_table(held, image="image", target="label")
    np.testing.assert_allclose(made.inputs, channels(PIXELS), atol=1e-7)
    assert made.classes == CLASSES
    assert made.ids == tuple("012345")
    assert made.select(where="age < 2").tolist() == [0, 1]
    again = read_table(tmp_path / "d.parquet", image="image", target="label", classes=CLASSES)
    assert np.array_equal(again.inputs, made.inputs)
    assert np.array_equal(again.targets, made.targets)
    np.savez(tmp_path / "pixels.npz", x=PIXELS, gray=PIXELS[..., 0], y=values["label"], reals=PIXELS / 255)
    assert np.array_equal(read_table(tmp_path / "pixels.npz", image="x", target="y").inputs, made.inputs)
    gray = read_table(tmp_path / "pixels.npz", image="gray", target="y", grayscale=True).inputs
    np.testing.assert_allclose(gray[:, 0], PIXELS[..., 0] / 255, atol=1e-7)
    with pytest.raises(InputError, match=r"row 1 is float64 of the shape \[5, 4, 3\]"):
        read_table(tmp_path / "pixels.npz", image="reals", target="y")
    for value in (3, [1, 2]):
        with pytest.raises(InputError, match="item 1 is of type"):
            read_table([{"image": value, "label": 0}], image="image", target="label")
    raw = [{"image": encoded(p), "label": 0} for p in PIXELS]
    assert read_table(raw, image="image", target="label").ids == tuple("012345")


def broken(folder: Path, what: str) -> None:
    if what == "cut":
        whole = (folder / "dog" / "1.png").read_bytes()
        (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    elif what == "no image":
        (folder / "dog" / "1.png").write_text("hello", encoding="utf-8")
    elif what == "other size":
        PIL.Image.fromarray(PIXELS[0][:3]).save(folder / "dog" / "1.png")
    elif what == "empty class":
        (folder / "fox").mkdir()
    elif what == "loose":
        PIL.Image.fromarray(PIXELS[0]).save(folder / "z.png")
    elif what == "range":
        PIL.Image.fromarray(np.zeros((5, 4), np.float32)).save(folder / "dog" / "2.tiff")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", "The image dog/1.png cannot be read"),
        ("no image", "The image dog/1.png cannot be read"),
        ("other size", "cat/1.png has 5 x 4 pixels and dog/1.png 3 x 4 pixels"),
        ("empty class", "class 'fox'"),
        ("loose", "z.png lies in"),
        ("range", "dog/2.tiff has pixels of type F"),
    ],
)
def test_bad_folders_are_refused(photos: Path, what: str, said: str) -> None:
    broken(photos, what)
    with pytest.raises(InputError) as caught:
        read_table(photos)
    assert said in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "x"}, "target names a column"),
        ({"task": "regression"}, "No numbers can be predicted"),
        ({"classes": ["cat", "dog"]}, "'eel'"),
        ({"size": 0}, "no pixel"),
        ({"mean": [0.5]}, "mean has 1 values and an image 3 channels"),
        ({"std": [1, 0, 1]}, "above 0"),
    ],
)
def test_bad_options_of_a_folder_are_refused(photos: Path, options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_table(photos, **options)
    (photos / "bare").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read_table(photos / "bare")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.png", "leaves the folder"),
        ("cat/../../secret.png", "leaves the folder"),
        ("link.png", "leaves the folder"),
        ("{outside}", "leaves the folder"),
        ("cat/3.png", "no image 'cat/3.png'"),
        ("cat", "no image 'cat'"),
        ("", "no image in line 3"),
        ("cat/1.png", "a second time in line 3"),
        ("cat/notes.txt", "line 3|cannot be read"),
        ("x" * 5000, "no image 'xxx"),
    ],
)
def test_paths_of_a_table_are_checked(photos: Path, name: str, said: str) -> None:
    outside = photos.parent / "secret.png"
    PIL.Image.fromarray(PIXELS[0]).save(outside)
    (photos / "link.png").symlink_to(outside)
    (photos / "labels.csv").write_text(f"file,kind\ncat/1.png,a\n{name.format(outside=outside)},b\n", encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_table(photos / "labels.csv", image="file", target="kind")
