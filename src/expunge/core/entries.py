"""Functions of the user's own, named on the command line: ``package.module:function`` or ``folder/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from expunge.core.errors import ExpungeError, InputError, OwnCodeError, nearest

ENTRY = "expunge_entry_"  #: how modules from files are named


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Run code of the user's: an error that it raises is told as such, with its own traceback.

    Args:
        what: names the code.

    Raises:
        OwnCodeError: it raised an error; one that is told in a sentence already passes as it is.
    """
    try:
        yield
    except ExpungeError:
        raise
    except Exception as error:
        trace = error.__traceback__
        others = ("<frozen importlib", importlib.__file__, str(Path(__file__).parents[1]))
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(others):
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        raise OwnCodeError(f"{what!r} raised {type(error).__name__}: {_sentence(error)}", "".join(lines)) from None


def _sentence(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return line if line.endswith((".", "!", "?")) else line + "."


def is_entry(source: str) -> bool:
    """Whether a source names a function: ``package.module:function`` or ``folder/file.py:function``."""
    place, colon, name = source.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or all(p.isidentifier() for p in place.split(".")))


def load_function(source: str, returns: str) -> Callable[..., Any]:
    """The function that ``source`` names. Its module is the user's own code, and runs as such.

    Args:
        source: see :func:`is_entry`.
        returns: what it is to do, in words that complete "Write it; ...".

    Raises:
        OwnCodeError: the module raises an error of its own.
        InputError: no such module or function.
    """
    place, _, name = source.rpartition(":")
    with own_code(source):
        module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        remedy = f"It has: {', '.join(nearest(name, known) or known)}." if known else f"Write it; {returns}."
        raise InputError(f"{place!r} has no function {name!r}.", remedy)
    found: Callable[..., Any] = function
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", "Give file.py:function or package.module:function.")
    name = f"{ENTRY}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{str(path)!r} is no Python file.", "Give file.py:function.")
    module = importlib.util.module_from_spec(spec)
    here = str(path.resolve().parent)
    if here not in sys.path:  # as for a script: it may import what lies beside it
        sys.path.insert(0, here)
    sys.modules[name] = module  # so that what it defines can be pickled for workers
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise InputError(
            f"There is no module {name!r}.", "Run from the folder that holds it, or give its path: file.py:function."
        ) from None
