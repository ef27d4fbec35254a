"""Pairs of small models whose difference is added to the scores of a large one (Huang et al. 2024, arXiv 2404.11045)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from expunge.adapters import composite
from expunge.adapters.assistant import first_blocks
from expunge.adapters.combination import Combination, different_vocabularies
from expunge.adapters.combined import Combined, load_pair
from expunge.adapters.identity import describe_tokenizer
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load, open_part
from expunge.adapters.storage import block_names
from expunge.core.errors import InputError


def small_model(served: LanguageAdapter, source: str) -> Any:
    """A small model that can stand beside a large one, in its number type and where it is.

    Args:
        served: the large one.
        source: folder (of a model, or of a run that left one), or name on the hub.

    Raises:
        InputError: it cannot be loaded, is more than one network, or has another tokenizer or vocabulary than the large one.
    """
    run = Path(source).expanduser()
    small = load(run / "model" if (run / "manifest.json").is_file() and (run / "model").is_dir() else source)
    if isinstance(small.model, composite.Composite):
        raise InputError(f"{source!r} is no plain model.", "Give a small model of the same family.")
    if describe_tokenizer(served.tokenizer) != describe_tokenizer(small.tokenizer):
        raise InputError(
            f"{source!r} has another tokenizer than the served model, so its scores are of other tokens.",
            "Use a small model of the same family.",
        )
    sizes = [int(a.model.get_input_embeddings().weight.shape[0]) for a in (served, small)]
    if sizes[0] != sizes[1]:
        raise different_vocabularies(*sizes)
    weight = next(served.model.parameters())
    return small.model.to(device=weight.device, dtype=weight.dtype).eval()


def put_beside(
    target: Any, small: Any, tune: Callable[[Any], Any], blocks: int | None, *, weight: float, keep_target: bool
) -> Combined:
    """Target and small models as one, ``z_target + weight (z_tuned - z_plain)``: the target, as long as nothing is trained.

    Args:
        target: the large model; it is frozen.
        small: ``plain``, which is frozen too; none: the target's first ``blocks`` blocks.
        tune: puts peft's wrapper around ``tuned``, a model of the same weights.
        blocks: see ``small``.
        weight: of the difference.
        keep_target: see :class:`~expunge.adapters.composite.Composite`.
    """
    plain = small if blocks is None else first_blocks(target, blocks)
    for frozen in (target, plain):
        frozen.requires_grad_(False)
    tuned = tune(first_blocks(plain, len(block_names(plain))))
    how = Combination(weight=weight, against="baseline", centred=False)
    return Combined(target, tuned, how, blocks=blocks, keep_target=keep_target, baseline=plain)


def pair_folder(source: str) -> Path | None:
    """The folder of a composite that a name stands for (itself, or the ``model/`` of a run); none if it is none."""
    folders = (Path(source).expanduser(), Path(source).expanduser() / "model")
    return next((f for f in folders if composite.is_composite(f)), None)


def saved_pair(served: LanguageAdapter, folder: Path) -> tuple[Any, Any, Combination]:
    """The two small models of a saved composite and how they are combined, for a large model that is there already.

    Raises:
        InputError: see :func:`expunge.adapters.combined.load_pair`.
    """
    tuned, plain, combination = load_pair(folder, served.model, open_part)
    device = next(served.model.parameters()).device
    return tuned.to(device), plain.to(device), combination
