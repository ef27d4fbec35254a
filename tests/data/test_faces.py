"""MUFAC and MUCAC: their folders, their splits by persons, and NoMUS on generated faces of that layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter
from expunge.audit.kernel.gaps import forgetting_score, nomus
from expunge.audit.kernel.membership import logistic_attack
from expunge.core.errors import InputError
from expunge.data.faces import AGES, read_mucac, read_mufac
from expunge.engine.functional import class_loss

PER = 6  #: images of a person


def drawn(rng: np.random.Generator, group: int) -> np.ndarray:
    """A face of 8 x 8 pixels: noise, and a bar at a height that tells the age group."""
    pixels = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
    pixels[group] = np.maximum(pixels[group], 185)
    return pixels


@pytest.fixture
def mufac(tmp_path: Path) -> Path:
    """Households 1 to 20 for training, 21 to 26 for test, 27 to 40 unseen."""
    rng = np.random.default_rng(0)
    for split, images, people in (
        ("train", "train", range(1, 21)),
        ("val", "val", range(21, 27)),
        ("test", "test", range(27, 41)),
    ):
        folder = tmp_path / f"{images}_images"
        folder.mkdir()
        lines = ["image_path,age_class"]
        for household in people:
            for number in range(PER):
                group = int(rng.integers(8))
                name = f"F{household:04d}_AGE_D_18_{'abcdefgh'[group]}{number}.png"
                PIL.Image.fromarray(drawn(rng, group)).save(folder / name)
                lines.append(f"{name},{'abcdefgh'[group]}")
        (tmp_path / f"custom_{split}_dataset.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_mufac_is_split_by_households(mufac: Path) -> None:
    faces = read_mufac(mufac, size=None, forget=60)
    assert (len(faces.train), len(faces.test), len(faces.unseen)) == (120, 36, 84)
    assert faces.train.classes == AGES
    assert faces.train.inputs.shape == (120, 3, 8, 8)
    assert faces.train.ids[0].startswith("train_images/F0001_AGE_D_18_")
    assert faces.forget.tolist() == list(range(60))
    assert set(faces.train.subjects[:60]) == {f"F{h:04d}" for h in range(1, 11)}
    for i in range(120):
        assert faces.train.targets[i] == "abcdefgh".index(Path(faces.train.ids[i]).stem[-2])
    assert faces.dropped == ()
    assert faces.train.select(where="group == 'a'").tolist() == np.flatnonzero(faces.train.targets == 0).tolist()


def test_a_household_is_forgotten_as_a_whole(mufac: Path) -> None:
    faces = read_mufac(mufac, size=None, forget=61)
    assert faces.forget.tolist() == list(range(66))
    owners = np.array(faces.train.subjects)
    assert not set(owners[faces.forget]) & set(owners[faces.retain])
    assert faces.train.select(subjects=["F0011"]).tolist() == list(range(60, 66))


def test_equal_images_are_left_out_where_they_come_later(mufac: Path) -> None:
    copy = (mufac / "train_images" / next(p.name for p in sorted((mufac / "train_images").iterdir()))).read_bytes()
    late = [sorted((mufac / f"{s}_images").iterdir())[-1] for s in ("train", "val", "test")]
    for path in late:
        path.write_bytes(copy)
    faces = read_mufac(mufac, size=None, forget=60)
    assert {Path(i).name for i in faces.dropped} == {p.name for p in late}
    assert (len(faces.train), len(faces.test), len(faces.unseen), len(faces.forget)) == (119, 35, 83, 60)
    assert faces.forget.tolist() == list(range(60))
    assert len(read_mufac(mufac, size=None, forget=60, deduplicate=False).train) == 120


def test_nomus_prefers_the_model_that_never_saw_the_persons(mufac: Path) -> None:
    faces = read_mufac(mufac, size=None, forget=60)

    def fitted(rows) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 8))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        x, y = torch.from_numpy(faces.train.inputs[rows]), torch.from_numpy(faces.train.targets[rows])
        for _ in range(150):
            optimizer.zero_grad()
            class_loss(model(x), y).mean().backward()
            optimizer.step()
        return model

    def judged(model: nn.Module) -> tuple[float, float]:
        adapter = ClassifierAdapter(model, AGES)

        def losses(data) -> np.ndarray:
            batch = adapter.collate([adapter.encode(r) for r in data])
            with torch.no_grad():
                return adapter.forward(model, batch, frozenset({"losses"})).losses.numpy()

        with torch.no_grad():
            hits = (model(torch.from_numpy(faces.test.inputs)).argmax(1).numpy() == faces.test.targets).mean()
        attack = logistic_attack(losses(faces.unseen.rows()), losses(faces.train.rows(faces.forget)))
        return nomus(float(hits), attack), forgetting_score(attack)

    original, retrained = judged(fitted(np.arange(120))), judged(fitted(faces.retain))
    assert original[1] > 0.25
    assert retrained[1] < 0.15
    assert original[0] < retrained[0]


@pytest.fixture
def mucac(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    images = tmp_path / "CelebAMask-HQ" / "CelebA-HQ-img"
    images.mkdir(parents=True)
    people = [5, 189, 190, 1249, 1250, 4854, 4855, 6000]
    identities, lines = [], ["24", "Bald Male Hat Smiling Young"]
    for number in range(24):
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(images / f"{number}.jpg")
        identities.append(f"{number}.jpg {people[number % 8]}")
        lines.append(f"{number}.jpg  -1 {1 if number % 2 else -1} 1 {1 if number % 3 else -1} {1 if number < 12 else -1}")
    (tmp_path / "CelebA-HQ-identity.txt").write_text("\n".join(identities) + "\n", encoding="utf-8")
    (tmp_path / "CelebA-HQ-attribute.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_mucac_is_split_by_identity(mucac: Path) -> None:
    faces = read_mucac(mucac, size=8)
    assert set(faces.test.subjects) == {"5", "189"}
    assert set(np.array(faces.train.subjects)[faces.forget]) == {"190", "1249"}
    assert set(np.array(faces.train.subjects)[faces.retain]) == {"1250", "4854"}
    assert set(faces.unseen.subjects) == {"4855", "6000"}
    assert [len(faces.test), len(faces.forget), len(faces.retain), len(faces.unseen)] == [6, 6, 6, 6]
    assert faces.train.ids[:2] == ("2.jpg", "3.jpg")
    for label, truth in (("gender", lambda n: n % 2), ("smiling", lambda n: n % 3 > 0), ("young", lambda n: n < 12)):
        made = read_mucac(mucac, label=label, size=4).unseen
        assert made.inputs.shape == (6, 3, 4, 4)
        assert made.classes == ("no", "yes")
        assert made.targets.tolist() == [int(truth(int(i.removesuffix(".jpg")))) for i in made.ids]
        assert made.columns[label].tolist() == made.targets.tolist()


def broken(mufac: Path, what: str) -> None:
    listing = mufac / "custom_val_dataset.csv"
    lines = listing.read_text(encoding="utf-8").splitlines()
    if what == "gone":
        listing.unlink()
    elif what == "age":
        listing.write_text("\n".join([*lines[:2], lines[2][:-1] + "k"]), encoding="utf-8")
    elif what == "household":
        listing.write_text("\n".join([lines[0], "x.png,a"]), encoding="utf-8")
    elif what == "image":
        next((mufac / "val_images").iterdir()).unlink()
    elif what == "both":
        path = mufac / "val_images" / lines[1].partition(",")[0]
        path.rename(path.with_name(path.name.replace("F0021", "F0001")))
        listing.write_text(listing.read_text(encoding="utf-8").replace("F0021", "F0001", 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gone", "no file"),
        ("age", "'k' in custom_val_dataset.csv line 3"),
        ("household", "names no household"),
        ("image", "There is no image"),
        ("both", "F0001 is in train and in test"),
    ],
)
def test_folders_that_are_not_mufac_are_refused(mufac: Path, what: str, said: str) -> None:
    broken(mufac, what)
    with pytest.raises(InputError, match=said):
        read_mufac(mufac, size=None, forget=60)


def test_a_forget_set_must_leave_something(mufac: Path) -> None:
    for count in (0, 115, 120):
        with pytest.raises(InputError, match="forgotten"):
            read_mufac(mufac, size=None, forget=count)


def test_lists_that_are_not_mucac_are_refused(mucac: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no label 'bald'"):
        read_mucac(mucac, label="bald")
    with pytest.raises(InputError, match="no folder"):
        read_mucac(tmp_path / "nowhere")
    identities = mucac / "CelebA-HQ-identity.txt"
    whole = identities.read_text(encoding="utf-8")
    for text, said in ((whole + "99.jpg 7\n", "99.jpg has no identity or no attributes"), (whole + "99.jpg\n", "line 25")):
        identities.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            read_mucac(mucac)
    identities.write_text("\n".join(f"{n}.jpg 7" for n in range(24)), encoding="utf-8")
    with pytest.raises(InputError, match="split 'forget'"):
        read_mucac(mucac)
