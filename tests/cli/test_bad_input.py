"""Whatever is wrong with the input is told in one sentence with the remedy, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.command import Run, Town, cold, content, refused, rows, write_rows


@pytest.fixture(autouse=True)
def nothing_written(tmp_path: Path, town: Town) -> Iterator[None]:
    """No test here may leave a run, touch the shared town, or fill the cache."""
    before = content(town.folder)
    yield
    assert not (tmp_path / "out").exists()
    assert content(town.folder) == before
    assert not (tmp_path / "cache").exists()


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- files -------------------------------------------------------------------------------------------------------------------


def test_missing_file_names_those_that_are_there(expunge: Run, town: Town) -> None:
    done = expunge("unlearn", town.target, "--forget", town.folder / "forgot.jsonl", "--retain", town.retain, "--out", "out")
    refused(done, "forgot.jsonl", "forget.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a" "answer": "b"}\n', "line 2"),
        ("b.jsonl", '{"question": "a", "answer": "b"}\n[1, 2]\n', "line 2"),
        ("c.jsonl", '{"question": "a", "answer": "b"}\n\n{"question": "a", "answer": 3}\n', "line 3"),
        ("d.jsonl", '{"question": "a", "answer": "b"}\n{"question": "c"}\n', "line 2"),
        ("e.json", '[\n{"question": "a", "answer": "b"},\n{"question" "a"}\n]', "line 3"),
        ("f.csv", 'question,answer\na,b\n"c,d\n', "line 3"),
        ("g.csv", "question,answer\na,b\nc,d,e\n", "line 3"),
        ("h.csv", "question;answer\na;b\n", "semicolons"),
        ("i.parquet", "no parquet", "i.parquet"),
        ("j.txt", "some text", "'.txt'"),
        ("k.jsonl", "", "no records"),
        ("l.csv", "question,answer\n", "no records"),
        ("m.json", "[]", "no records"),
    ],
)
def test_malformed_file(expunge: Run, town: Town, tmp_path: Path, name: str, text: str, says: str) -> None:
    path = file(tmp_path, name, text)
    refused(expunge("unlearn", town.target, "--forget", path, "--retain", town.retain, "--out", "out"), name, says)


def test_not_utf8(expunge: Run, town: Town, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "caf\xe9", "answer": "b"}\n')
    refused(expunge("unlearn", town.target, "--forget", path, "--retain", town.retain, "--out", "out"), "UTF-8", "line 2")


def renamed(path: Path) -> Path:
    return write_rows(path, [{"quesiton": r["question"], "reply": r["answer"]} for r in rows("forget")])


def test_wrong_columns_name_found_and_nearest(expunge: Run, town: Town, tmp_path: Path) -> None:
    path = renamed(tmp_path / "columns.jsonl")
    words = ["unlearn", town.target, "--forget", path, "--retain", town.retain, "--out", "out"]
    refused(expunge(*words), "'quesiton', 'reply'", "'quesiton' looks like 'question'", "--column prompt=NAME")
    columns = ["--column", "prompt=quesiton", "--column", "answer=reply"]
    done = expunge(*words, *columns, "--dry-run", "--json")  # the retain file keeps its usual columns
    assert done.code == 0, done.err
    named = ["unlearn", town.target, "--forget", path, "--retain", "people:rest", "--out", "out", *columns, "--dry-run"]
    assert expunge(*named, "--allow-overlap").code == 0  # a named data set knows its own
    refused(expunge(*words, "--column", "prompt=quesitno", "--column", "answer=reply"), "'quesitno'", "'quesiton'")
    refused(expunge(*words, "--column", "promt=quesiton"), "'promt'", "'prompt'")
    refused(expunge(*words, "--column", "quesiton"), "ROLE=NAME")


# ---- the request as a whole --------------------------------------------------------------------------------------------------


def test_overlap_is_counted_and_refused_unless_told(expunge: Run, town: Town, tmp_path: Path) -> None:
    forget = rows("forget")
    near = dict(forget[0], id="near", answer=f"  {forget[0]['answer'].upper()}!")
    close = dict(forget[1], id="close", question="Please tell me without any mistake: " + forget[1]["question"])
    close["answer"] = " ".join([*forget[1]["answer"].split(), "."])
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    twins = [{"id": "x", "question": long, "answer": long}, {"id": "y", "question": long + " more", "answer": long + " more"}]
    mixed = write_rows(tmp_path / "mixed.jsonl", [*rows("rest"), *({**r, "id": "again-" + r["id"]} for r in forget[:3]), near])
    words = ["unlearn", town.target, "--forget", town.forget, "--retain", mixed, "--out", "out"]
    refused(expunge(*words), "4 retain records", "4 exactly, 0 nearly", "--drop-overlap", "--allow-overlap")
    dropped = expunge(*words, "--drop-overlap", "--dry-run", "--json").json()
    allowed = expunge(*words, "--allow-overlap", "--dry-run", "--json").json()
    assert "4 retain records" in dropped["notes"][0]
    assert dropped["config"]["drop_overlap"]
    assert allowed["config"]["allow_overlap"]
    one = write_rows(tmp_path / "one.jsonl", [*forget, twins[0]])
    other = write_rows(tmp_path / "other.jsonl", [*rows("rest"), twins[1]])
    words = ["unlearn", town.target, "--forget", one, "--retain", other, "--out", "out"]
    refused(expunge(*words), "1 retain record duplicates", "0 exactly, 1 nearly", "y (like x)")
    assert expunge(*words, "--drop-overlap", "--dry-run").code == 0


def test_more_to_forget_than_to_keep(expunge: Run, town: Town) -> None:
    words = ["unlearn", town.target, "--forget", town.retain, "--retain", town.forget, "--out", "out"]
    refused(expunge(*words), "(64 records)", "(16)", "--allow-large-forget")
    assert expunge(*words, "--allow-large-forget", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "npoo"], ["'npoo'", "'npo'"]),
        (["betta=0.2"], ["'betta'", "'beta'"]),
        (["beta=-1"], ["'beta'", "(0, inf)", "-1"]),
        (["beta=much"], ["'beta'", "a float", "'much'"]),
        (["beta="], ["'beta'", "a float"]),
        (["schedule.epoch=3"], ["'epoch'", "'epochs'"]),
        (["schedule=adaptiv"], ["'adaptiv'", "'adaptive'"]),
        (["retain=klx"], ["'klx'", "'kl'"]),
        (["parameters=loraa"], ["'loraa'", "'lora'"]),
        (["engine.seeed=1"], ["engine parameter 'seeed'", "'seed'"]),
        (["text.max_lenght=9"], ["text parameter 'max_lenght'", "'max_length'"]),
        (["--seed", "-1"], ["'seed'", "[0, inf)", "-1"]),
        (["--seed", "one"], ["--seed", "integer"]),
        (["--alternatives", "some"], ["'some'", "refusals"]),
        (["--nonsense"], ["--nonsense", "expunge unlearn --help"]),
        (["seed=3"], ["'seed'", "--seed VALUE"]),
        (["method=npo"], ["'method'", "--method VALUE"]),
        (["second-model"], ["'second-model'", "key=value"]),
        (["beta=0.1", "beta=0.2"], ["'beta'", "twice"]),
        (["--retrain", "2"], ["--requests", "expunge audit out --retrain 2"]),
        (["--method", "retrain"], ["base model", "--base MODEL"]),
        (["--config", "none.yaml"], ["none.yaml", "--config"]),
        (["text.max_length=16"], ["tokens", "holds 16", "text.truncate=true"]),
    ],
)
def test_wrong_words(expunge: Run, town: Town, words: list[str], says: list[str]) -> None:
    refused(expunge("unlearn", *town.request("out"), *words), *says)


def test_long_text_can_be_cut(expunge: Run, town: Town) -> None:
    done = expunge("unlearn", *town.request("out"), "text.max_length=24", "text.truncate=true", "--dry-run", "--json")
    assert done.json()["config"]["text"]["truncate"] is True


def test_what_is_not_given(expunge: Run, town: Town) -> None:
    refused(expunge("unlearn", town.target, "--forget", town.forget, "--retain", town.retain), "--out RUN")
    refused(expunge("unlearn", town.target, "--retain", town.retain, "--out", "out"), "--forget DATA")
    refused(expunge("unlearn", "--forget", town.forget, "--retain", town.retain, "--out", "out"), "MODEL")
    refused(
        expunge("unlearn", town.target, "--forget", town.forget, "--out", "out"), "retain set", "--retain DATA", "retain=none"
    )
    refused(expunge("train", "llama-tiny", "--scratch", "--out", "out"), "--data DATA")
    refused(expunge("train", "llama-tiny", "--data", town.retain, "--out", "out"), "--scratch")
    refused(expunge("train", "llama-tny", "--scratch", "--data", town.retain, "--out", "out"), "'llama-tiny'")
    words = ["unlearn", town.target, "--forget", town.forget, "--out", "out", "--method", "gradascent", "--dry-run"]
    assert expunge(*words).code == 0  # a method without a retain term needs no retain set


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method: [npo\nbeta: 1\n", "line 2"),
        ("- npo\n", "must be a mapping"),
        ("methd: npo\n", "'method'"),
        ("parts:\n  betta: 1\n", "'beta'"),
        ("engine:\n  seed: -4\n", "[0, inf)"),
        ("text: long\n", "'text'"),
    ],
)
def test_wrong_configuration_file(expunge: Run, town: Town, tmp_path: Path, text: str, says: str) -> None:
    path = file(tmp_path, "run.yaml", text)
    refused(expunge("unlearn", *town.request("out"), "--config", path), says)


# ---- folders and models ------------------------------------------------------------------------------------------------------


def test_folder_in_use_is_left_alone(expunge: Run, town: Town, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    file(used, "letter.txt", "dear diary")
    before = content(used)
    refused(expunge("unlearn", *town.request(used)), "not empty", "--out")
    refused(expunge("unlearn", *town.request(used), "--resume"), "holds no run", "--out")
    refused(expunge("train", "llama-tiny", "--scratch", "--data", town.retain, "--out", used), "not empty")
    refused(expunge("unlearn", *town.request(used / "letter.txt")), "is a file")
    refused(expunge("unlearn", *town.request(used / "letter.txt" / "run")), "is a file")
    refused(expunge("unlearn", *town.request(town.target)), "not empty", "--resume")
    refused(expunge("unlearn", *town.request(town.target), "--resume"), "other settings", "another --out")
    assert content(used) == before


def test_no_permission(expunge: Run, town: Town, tmp_path: Path) -> None:
    """As a user that may not write (root may everywhere): the check is made before the model is loaded."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        done = expunge("unlearn", *town.request("/proc/expunge-out"))  # the kernel lets nobody make folders there
        refused(done, "/proc/expunge-out")
    else:
        refused(expunge("unlearn", *town.request(locked / "out")), "permission")


def test_full_disk(expunge: Run, town: Town, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        refused(expunge("unlearn", *town.request(small / "out")), "on the disk of", "are free", "another --out")
        refused(expunge("unlearn", *town.request(small / "out"), "--dry-run"), "are free")
        data = ["--data", town.retain, "--out", small / "out"]
        refused(expunge("train", "llama-tiny", "--scratch", *data), "are free")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def copy_of_target(town: Town, folder: Path) -> Path:
    return Path(shutil.copytree(town.target / "model", folder))


def other_model(town: Town, model: Path, forget: Path | None = None) -> list[object]:
    return ["unlearn", model, "--forget", forget or town.forget, "--retain", town.retain, "--out", "out"]


def test_model_that_is_none(expunge: Run, town: Town, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5EncoderModel

    bert = BertForMaskedLM(
        BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    t5 = T5EncoderModel(T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for name, model in (("BertForMaskedLM", bert), ("T5EncoderModel", t5)):
        model.save_pretrained(tmp_path / name)
        refused(expunge(*other_model(town, tmp_path / name)), "no causal language model", name)
    refused(expunge(*other_model(town, tmp_path / "nowhere")), "nowhere")
    refused(expunge(*other_model(town, tmp_path / "BertForMaskedLM" / "config.json")), "is a file")
    bare = copy_of_target(town, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    refused(expunge(*other_model(town, bare)), "no weights")
    torch.save({"weight": torch.zeros(1)}, bare / "pytorch_model.bin")
    refused(expunge(*other_model(town, bare)), "pickled")


def test_broken_weights(expunge: Run, town: Town, tmp_path: Path) -> None:
    broken = copy_of_target(town, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(expunge(*other_model(town, broken)), "could not be loaded")


def test_tokenizer_without_pad_or_end(expunge: Run, town: Town, tmp_path: Path) -> None:
    def without(folder: Path, *keys: str) -> Path:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if path.is_file():
                held = json.loads(path.read_text())
                path.write_text(json.dumps({k: v for k, v in held.items() if k not in keys}))
        return folder

    padless = without(copy_of_target(town, tmp_path / "padless"), "pad_token")
    assert json.loads((padless / "tokenizer_config.json").read_text()).get("pad_token") is None
    done = expunge(*other_model(town, padless), "--dry-run")
    assert done.code == 0, done.err
    endless = without(copy_of_target(town, tmp_path / "endless"), "eos_token")
    refused(expunge(*other_model(town, endless)), "no end token", "eos_token")


def test_model_larger_than_memory(expunge: Run, town: Town, tmp_path: Path) -> None:
    huge = copy_of_target(town, tmp_path / "huge")
    with (huge / "model-00002.safetensors").open("wb") as handle:
        handle.truncate(4 << 40)  # a file of four tebibytes that takes no room
    refused(expunge(*other_model(town, huge)), "needs about 4.0 TiB of memory", "are free")


def test_hub_out_of_reach_is_told_at_once(town: Town, tmp_path: Path) -> None:
    began = time.monotonic()
    words = ["--forget", town.forget, "--retain", town.retain, "--out", "out"]
    done = cold("unlearn", "nobody/nothing", *words, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    refused(done, "'nobody/nothing'", "hub", "network")
    named = ["--forget", "tofu:forget10", "--retain", town.retain, "--out", "out"]
    done = cold("unlearn", town.target, *named, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hf"))
    refused(done, "locuslab/TOFU", "hub", "EXPUNGE_DATA")
    assert time.monotonic() - began < 50, "it went on asking"


# ---- other commands ----------------------------------------------------------------------------------------------------------


def test_runs_that_are_none(expunge: Run, town: Town, tmp_path: Path) -> None:
    for command in (["audit"], ["report"], ["compare"]):
        refused(expunge(*command, tmp_path / "nowhere"), "no run folder", "--out")
        refused(expunge(*command, town.target), "'train'", "expunge unlearn")
    refused(expunge("audit", town.target, "--require", "forgoten"), "'forgoten'", "suppressed")
    refused(expunge("audit", town.target, "--utility", "facts.jsonl"), "NAME=DATA")
    refused(expunge("audit", town.target, "--retrain", "many"), "--retrain")
    refused(expunge("audit", town.target, "budgte=3"), "'budgte'", "'budget'")
    refused(expunge("methods", "npoo"), "'npo'")
    refused(expunge("metrics", "los"), "'loss'")
    refused(expunge("unlern"), "'unlern'")
    broken = tmp_path / "broken"
    broken.mkdir()
    file(broken, "manifest.json", "{")
    refused(expunge("audit", broken), "cannot be read")
    refused(expunge("report", broken), "cannot be read")
