"""The hub's layout of each data set: a folder for each configuration with numbered Parquet files, or lines of JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from expunge.core.errors import InputError
from expunge.data.readers import rows_of
from expunge.data.sources import load
from tests.benchmarks.world import sampled

#: benchmark, reference, the sample's file, configuration and split on the hub
CASES = [
    ("wmdp", "wmdp:bio", "wmdp-bio.json", "wmdp-bio", "test"),
    ("wmdp", "wmdp:bio-forget-corpus?hazardous=true", "bio-forget-corpus.jsonl", "bio-forget-corpus", "train"),
    ("truthfulqa", "truthfulqa:mc1?shots=0", "", "multiple_choice", "validation"),
    ("muse-news", "muse:news-verbmem", "bbc/verbmem/forget.json", "verbmem", "forget"),
    ("muse-news", "muse:news-knowmem-retain?shots=0", "bbc/knowmem/retain2_qa.json", "knowmem", "retain_qa"),
    ("pistol", "pistol:forget?edges=A_B", "sample_data_1.json", "pistol_data_1", "train"),
    ("knowundo", "knowundo:unlearn-val", "privacy/unlearn.json", "privacy", "unlearn"),
]


def at(reference: str, folder: Path) -> str:
    return f"{reference}{'&' if '?' in reference else '?'}folder={folder}"


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    """Rows of the sample; for TruthfulQA, whose sample is the authors' CSV, in the form of the hub."""
    if not file:
        return [
            {"question": f"Number {i}?", "mc1_targets": {"choices": [f"yes {i}", "no"], "labels": [1, 0]}} for i in range(5)
        ]  # fmt: skip
    path = folder / file
    if file == "privacy/unlearn.json":
        return [json.loads(path.read_text())]
    return [row for _, row in rows_of(path, texts=True)]


@pytest.mark.parametrize(("benchmark", "reference", "file", "configuration", "split"), CASES)
def test_the_hubs_layout_reads_as_the_authors(
    tmp_path: Path, benchmark: str, reference: str, file: str, configuration: str, split: str
) -> None:
    pandas = pytest.importorskip("pandas")
    own = tmp_path / "own"
    sampled(benchmark, own)
    held = rows(own, file)
    hub, lines = tmp_path / "hub" / configuration, tmp_path / "lines" / configuration
    hub.mkdir(parents=True)
    lines.mkdir(parents=True)
    half = (len(held) + 1) // 2
    parts = [held[:half], held[half:]] if len(held) > 1 else [held]
    for i, part in enumerate(parts):
        pandas.DataFrame(part).to_parquet(hub / f"{split}-{i:05d}-of-{len(parts):05d}.parquet")
    (lines / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    found = load(at(reference, hub.parent), name="x")
    assert found.digest == load(at(reference, lines.parent), name="x").digest
    if file:
        assert found.digest == load(at(reference, own), name="x").digest
    assert len(found) >= 3
    if len(parts) > 1:
        next(hub.glob("*-00001-of-*")).unlink()
        with pytest.raises(InputError, match="holds 1 of 2 files"):
            load(at(reference, hub.parent), name="x")


def test_rwku_is_read_from_configurations_of_the_hub(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    sampled("rwku", tmp_path / "own")
    people = sorted(p for p in (tmp_path / "own").iterdir() if p.is_dir())
    names = {
        "forget_level2": ("forget_level2", "test"),
        "forget_mia": ("mia_forget", "test"),
        "positive": ("train_positive_llama3", "train"),
    }
    for file, (configuration, split) in names.items():
        held = [r for p in people for r in json.loads((p / f"{file}.json").read_text())]
        place = tmp_path / "hub" / configuration
        place.mkdir(parents=True)
        pandas.DataFrame(held).to_parquet(place / f"{split}-00000-of-00001.parquet")
    for part in ("forget-qa", "mia-forget", "corpus"):
        one, two = (load(f"rwku:{part}?folder={tmp_path / f}&chat=false", name="x") for f in ("own", "hub"))
        assert sorted((r.prompt, r.answer) for r in one) == sorted((r.prompt, r.answer) for r in two), part


def test_the_authors_file_comes_before_the_hubs(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    sampled("wmdp", folder)
    (folder / "wmdp-bio").mkdir()
    shutil.copy(folder / "wmdp-cyber.json", folder / "wmdp-bio" / "test.json")
    before = json.loads((folder / "wmdp-bio.json").read_text())[0]["question"]
    assert before in load(f"wmdp:bio?folder={folder}", name="x")[0].prompt
