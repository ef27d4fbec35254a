"""The optional libraries of this floor, imported when first needed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from expunge.core.errors import MissingExtra


def need(module: str, feature: str, extra: str = "llm") -> Any:
    """An optional library, by its name.

    Raises:
        MissingExtra: it is not installed; ``feature`` says what needs it, ``extra`` what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(feature, extra) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads or saves."""
    logging = need("transformers", "A language model").utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
