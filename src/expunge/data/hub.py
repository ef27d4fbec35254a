"""Data sets of the Hugging Face hub, through its local cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from expunge.core.errors import InputError, MissingExtra


def hub_rows(repository: str, configuration: str | None, split: str, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set of the hub, with their places ("row 3"); what is in the cache is not fetched again.

    Args:
        repository: ``"owner/name"``.
        configuration: the data set's configuration; ``None`` for its only one.
        split: "train", "test", ...
        remedy: what to do when it cannot be had.

    Raises:
        MissingExtra: the package ``datasets`` is not installed.
        InputError: the hub is unreachable and the cache does not hold it, or there is no such data set.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra(f"Fetching {repository} from the hub", "llm") from None
    what = repository + (f" ({configuration})" if configuration else "")
    # The client asks the hub first and retries for half a minute without a network: one quick question says whether to ask.
    unreachable = _unreachable(repository)
    held = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = held or bool(unreachable)
        table = datasets.load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        # The hub client has no common base for "offline", "not found" and "refused"; each of them is one of these three.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{what} cannot be had from the hub: {unreachable or reason}.", remedy) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = held
    return ((f"row {number}", dict(row)) for number, row in enumerate(table, start=1))


def _unreachable(repository: str) -> str:
    """Why the hub does not answer for a data set; empty if it does."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repository, timeout=10)
    except Exception as error:  # of several libraries: name resolution, HTTP, permissions, offline mode
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return ""
