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
    try:
        table = datasets.load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        # The hub client has no common base for "offline", "not found" and "refused"; each of them is one of these three.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{what} cannot be had from the hub: {reason}.", remedy) from error
    return ((f"row {number}", dict(row)) for number, row in enumerate(table, start=1))
