"""The cache of an audit: what a model said about an example, under a key made of contents, never of names or paths."""

from __future__ import annotations

import json
import platform
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.core.files import atomic_path, digest_bytes, digest_json, write_text

SCHEMA = "scores-1"  #: part of every key: a change of what is stored makes old files invisible instead of wrong

Arrays = Mapping[str, npt.NDArray[Any]]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are (the CPU for a model without any)."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def compute_signature(adapter: Adapter, batch_tokens: int) -> dict[str, str]:
    """What, besides weights and text, can move the last digits of a score; numbers are comparable only where it is equal.

    Args:
        adapter: holds the model.
        batch_tokens: padded tokens per batch: the batch a sequence shares decides how its sums are ordered.

    Returns:
        Precision of the parameters, kind of device, attention kernel, batch size, versions.
    """
    model = adapter.model
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    config = getattr(model, "config", None)
    return {
        "precision": "+".join(dtypes) or "none",
        "device": device_of(model).type,
        "attention": str(getattr(config, "_attn_implementation", None) or "default"),
        "batch_tokens": str(batch_tokens),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "schema": SCHEMA,
    }


def examples_digest(adapter: Adapter, examples: Sequence[Example]) -> str:
    """SHA-256 over ids and model inputs (token ids, not strings: a template changes ids without changing the text)."""
    batch = adapter.collate(examples)
    parts = ["\0".join(batch.ids).encode()]
    for name in sorted(batch.tensors):
        tensor = batch.tensors[name].detach().cpu().contiguous()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    parts += [batch.targets.cpu().numpy().tobytes(), repr(batch.counts).encode()]
    return digest_bytes(*parts)


class ScoreStore:
    """Files of an audit under one folder: per-target arrays as ``.npz``, generations as JSON lines, all written atomically.

    Args:
        folder: made when the first file is written; may be shared by any number of audits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, kind: str, fingerprint: str, signature: Mapping[str, str], content: str, **options: Any) -> str:
        """The name of a file: a hash of model, compute signature, example contents and options."""
        return digest_json([SCHEMA, kind, fingerprint, dict(signature), content, options])

    def arrays_path(self, key: str) -> Path:
        """Where the arrays of ``key`` are or will be."""
        return self.folder / "arrays" / key[:2] / f"{key}.npz"

    def save_arrays(self, key: str, arrays: Arrays) -> Path:
        """Write arrays (uncompressed, so that one column can be read without the others)."""
        path = self.arrays_path(key)
        with atomic_path(path) as temporary:
            np.savez(temporary, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})
        return path

    def load_arrays(self, key: str, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]] | None:
        """Read the arrays of ``key``, or only ``names``; None if they are not there or damaged (then they are made anew)."""
        path = self.arrays_path(key)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {n: archive[n] for n in (names if names is not None else archive.files)}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"The cached file {path} is damaged and will be computed anew: {error}", stacklevel=2)
            return None

    def lines_path(self, key: str) -> Path:
        """Where the JSON lines of ``key`` are or will be."""
        return self.folder / "generations" / key[:2] / f"{key}.jsonl"

    def save_lines(self, key: str, lines: Sequence[Mapping[str, Any]]) -> Path:
        """Write one JSON object per line."""
        path = self.lines_path(key)
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return path

    def load_lines(self, key: str) -> list[dict[str, Any]] | None:
        """Read the JSON lines of ``key``; None if they are not there or cannot be read (then they are made anew)."""
        path = self.lines_path(key)
        if not path.is_file():
            return None
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            warnings.warn(f"The cached file {path} is damaged and will be computed anew: {error}", stacklevel=2)
            return None
