"""Models that are more than the weights of one network: a target that stays as it is, and what is put beside it.

There are two kinds. A *projected* model is the target itself with something taken out of its states
(:mod:`expunge.adapters.projection`), and only its folder is of this layout. A composite is a torch module that answers what
:class:`~expunge.adapters.language.LanguageAdapter` asks of a transformers model (configuration, embeddings, head, forward pass,
``generate``), so everything that is done with a model can be done with it: it is scored, attacked, fingerprinted, copied, saved
and loaded. Its folder is

.. code-block:: text

    composite.json      kind of composite, its settings, where the target is, and the hash of the target's weights
    target/             the target in the layout of transformers (absent if it is named instead)
    assistant/ ...      what stands beside it, in the layout of transformers or peft
    tokenizer.json ...  the tokenizer, shared by all

with weights as safetensors only.
"""

from __future__ import annotations

import abc
import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from expunge.adapters import identity, storage
from expunge.adapters.head import base
from expunge.core.errors import InputError, unknown
from expunge.core.files import write_json

FILE = "composite.json"
FORMAT = 1
#: module of each kind, with a function ``load_parts``
_KINDS = {
    "combined": "expunge.adapters.combined", "gated": "expunge.adapters.gated", "projected": "expunge.adapters.projection",
}  # fmt: skip

Open = Callable[[Path], Any]  #: a transformers model from a folder


class Composite(nn.Module, abc.ABC):
    """A target and what is put beside it.

    Args:
        target: a transformers model with a language-modelling head, not wrapped.
        keep_target: whether the saved folder holds the target's weights; if not, its name and the hash of its weights.

    Raises:
        InputError: the target is no plain model, or shall be named and has no name.
    """

    kind: ClassVar[str]
    packs: ClassVar[bool] = False  #: whether ragged batches may be run through it without their padding

    def __init__(self, target: Any, *, keep_target: bool = True) -> None:
        super().__init__()
        if base(target) is not target or isinstance(target, Composite):
            raise InputError(
                f"The target is a {type(target).__name__}, and no plain model.",
                "Merge its adapter into its weights first, or start from the model before the first request.",
            )
        if not keep_target and not getattr(target.config, "_name_or_path", ""):
            raise InputError("The target has no name under which it could be found again.", "Keep its weights: keep_target=true.")
        self.target: Any
        self.target = target
        self.keep_target = keep_target
        self.config: Any = copy.deepcopy(target.config)
        self.generation_config: Any = target.generation_config

    # ---- what each kind says

    @abc.abstractmethod
    def described(self) -> dict[str, Any]:
        """All beside the weights that decides what it says, as plain values: kept in its configuration and in its folder."""

    @abc.abstractmethod
    def save_parts(self, folder: Path) -> None:
        """Write what stands beside the target into ``folder``."""

    @abc.abstractmethod
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """Generate, as the target's own ``generate`` does."""

    def parts(self) -> dict[str, Any]:
        """The models that lie inside, each of which can be asked alone: the target, and what else answers by itself."""
        return {"the target": self.target}

    def describe(self) -> None:
        """Put :meth:`described` into the configuration, which the fingerprint reads; to be called when it changes."""
        self.config.composite = {"kind": self.kind, **self.described()}

    # ---- what is asked of a transformers model

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        found: torch.device = next(self.target.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the target's weights."""
        found: torch.dtype = next(self.target.parameters()).dtype
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        found: nn.Module = self.target.get_input_embeddings()
        return found

    @abc.abstractmethod
    def get_output_embeddings(self) -> nn.Module:
        """The module that makes the scores, called once in a forward pass with all that they are made of."""

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the layout above (without the tokenizer) into an existing folder."""
        folder = Path(folder)
        digest = identity.weights_hash(self.target).hexdigest()
        name = None if self.keep_target else self.target.config._name_or_path
        target = {"name": name, "digest": digest, "dtype": str(self.dtype)}
        held = {"format": FORMAT, "kind": self.kind, "target": target, **self.described()}
        if self.keep_target:
            with storage.savable(self.target):
                self.target.save_pretrained(folder / "target")
        self.save_parts(folder)
        write_json(folder / FILE, held)


def is_composite(folder: Path) -> bool:
    """Whether a folder holds a composite."""
    return (folder / FILE).is_file()


def read(folder: Path) -> dict[str, Any]:
    """What ``composite.json`` says.

    Raises:
        InputError: it is damaged, or of another version.
    """
    path = folder / FILE
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, kind, target = held["format"], held["kind"], held["target"]
        damaged = not isinstance(target, Mapping) or not {"name", "digest", "dtype"} <= set(target)
    except (OSError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise InputError(f"{str(path)!r} does not describe a model.", "Restore the folder from a copy, or make it again.")
    if version != FORMAT:
        raise InputError(f"{str(path)!r} is of version {version}; this one reads {FORMAT}.", "Use the version that wrote it.")
    if kind not in _KINDS:
        raise unknown("kind of composite model", str(kind), _KINDS)
    return held


def load(folder: Path, open_model: Open) -> Any:
    """Load a composite, or a model with projections.

    Args:
        folder: as its ``save_pretrained`` wrote it.
        open_model: loads a model from a folder (or the target by its name).

    Raises:
        InputError: a file is missing or damaged, or the named target has other weights now (looked at where it is loaded in the
            number type that it had then).
    """
    held = read(folder)
    name, digest = held["target"]["name"], held["target"]["digest"]
    target = open_model(folder / "target" if name is None else Path(name))
    if name is not None and str(target.dtype) == held["target"]["dtype"] and identity.weights_hash(target).hexdigest() != digest:
        raise InputError(
            f"The target {name!r} has other weights than when the model in {str(folder)!r} was made.",
            "Restore them, or unlearn again.",
        )
    module: Any = importlib.import_module(_KINDS[held["kind"]])
    made = module.load_parts(folder, held, target, open_model)
    if isinstance(made, Composite):
        made.keep_target = name is None
    return made
