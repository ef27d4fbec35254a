"""One generic registry: built-ins by decorator, other packages by entry point, never a central list to edit."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import threading
import types
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from expunge.core.errors import InputError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind.

    Args:
        kind: the singular noun used in messages ("method").
        package: dotted name of the package whose modules register built-ins when imported; they are imported on the
            first listing or the first name that is not found, so importing Expunge stays cheap.
        group: the entry-point group by which other packages add to it ("expunge.methods"). An entry point must load to
            the object itself or to a module or function whose import registers it. One that fails to load is reported
            by :meth:`broken` and never hides the others.
    """

    def __init__(self, kind: str, package: str | None = None, group: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.group = group
        self._objects: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._broken: dict[str, str] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def add(self, name: str, obj: T, origin: str = "expunge") -> T:
        """Register ``obj`` as ``name``; ``origin`` is the distribution that brings it.

        Raises:
            InputError: the name is not lower-case words joined by ``-`` or ``_``, or another object holds it.
        """
        if not name or name != name.lower() or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{name!r} is no name for a {self.kind}: use lower-case letters, digits, '-' and '_'.")
        held = self._objects.get(name)
        # A module that is imported twice (reload, two import paths) registers the same definition again: that is no clash.
        if held is not None and _definition(held) != _definition(obj):
            raise InputError(f"Two {self.kind}s are called {name!r}: {_definition(held)} and {_definition(obj)}.", "Rename one.")
        self._objects[name] = obj
        self._origins[name] = origin
        return obj

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda obj: self.add(name, obj)

    def get(self, name: str) -> T:
        """The object called ``name``.

        Raises:
            InputError: there is none; the message names the nearest ones.
        """
        if name not in self._objects:
            self._load()
        if name not in self._objects:
            raise unknown(self.kind, name, self._objects)
        return self._objects[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._objects)

    def items(self) -> Iterator[tuple[str, T]]:
        """Pairs of name and object, sorted by name."""
        for name in self.names():
            yield name, self._objects[name]

    def origin(self, name: str) -> str:
        """The distribution that registered ``name``."""
        self.get(name)
        return self._origins[name]

    def broken(self) -> dict[str, str]:
        """Entry points that could not be loaded, with the reason."""
        self._load()
        return dict(self._broken)

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._objects

    def _load(self) -> None:
        with self._lock:
            if self._loaded:
                return
            self._loaded = True  # before the imports: a module may look names up while it registers its own
            try:
                self._load_package()
            except BaseException:
                self._loaded = False  # a module of Expunge that cannot be imported must say so again, not hide its names
                raise
            if self.group:
                for point in importlib.metadata.entry_points(group=self.group):
                    self._load_point(point)

    def _load_package(self) -> None:
        if not self.package:
            return
        package = importlib.import_module(self.package)
        for info in sorted(pkgutil.walk_packages(package.__path__, self.package + "."), key=lambda i: i.name):
            importlib.import_module(info.name)

    def _load_point(self, point: importlib.metadata.EntryPoint) -> None:
        origin = point.dist.name if point.dist else point.value
        before = set(self._objects)
        try:
            loaded = point.load()
            # A module, and anything whose import registered something, has done its work; the rest is the object itself. A name
            # that another object holds goes through add() too, which reports the clash.
            done = bool(set(self._objects) - before) or any(held is loaded for held in self._objects.values())
            if not isinstance(loaded, types.ModuleType) and not done:
                self.add(point.name, loaded, origin)
        except Exception as error:  # a plug-in is foreign code: whatever it raises must not take Expunge down
            self._broken[point.name] = f"{origin}: {type(error).__name__}: {error}"
        for name in set(self._objects) - before:
            self._origins[name] = origin


def origin_of(module: str) -> str:
    """The distribution that a module belongs to; its top-level package where it is not installed."""
    package = module.partition(".")[0]
    if package == "expunge":
        return package
    return importlib.metadata.packages_distributions().get(package, [package])[0]


def _definition(obj: object) -> str:
    module = getattr(obj, "__module__", type(obj).__module__)
    name = getattr(obj, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(obj))  # addresses differ after a reload
    return f"{module}.{name}"
