"""The reference: commands, settings of the stages, exit codes, and what Python users import."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import typer

import expunge
from docgen.metrics import signature
from docgen.text import code, inline, markdown, page, parameters, table
from expunge.audit import verdict
from expunge.core import errors
from expunge.core.settings import Settings, describe_value


def pages() -> dict[str, str]:
    """All reference pages."""
    return {
        "reference/cli.md": _cli(),
        "reference/settings.md": _settings(),
        "reference/python.md": _python(),
        "reference/verdict.md": _verdict(),
    }


def command_tree() -> Any:
    """The root command, as typer builds it."""
    from expunge.cli.main import app

    return typer.main.get_command(app)


def _cli() -> str:
    root = command_tree()
    blocks = [_prose(root.help or "")]
    names = sorted(root.commands)
    blocks.append(table(["command", "what it does"], [[f"[`expunge {n}`](#{n})", _first(root.commands[n].help)] for n in names]))
    blocks.append("## Exit codes")
    blocks.append(_exit_codes())
    for name in names:
        blocks += [f"## `expunge {name}` {{ #{name} }}", *_command(root.commands[name], f"expunge {name}")]
    return page("Command line", *blocks)


def _command(command: Any, path: str) -> Iterator[str]:
    words = [_metavar(p) if p.param_type_name == "argument" else "" for p in command.params]
    yield code(" ".join([path, *(w for w in words if w), "[OPTIONS]"]), "sh")
    yield _prose(command.help or "")
    rows = [_row(p) for p in command.params if not getattr(p, "hidden", False)]
    if rows:
        yield table(["argument or option", "meaning", "default"], rows)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield f"### `{path} {name}`"
        yield from _command(inner, f"{path} {name}")


def _metavar(p: Any) -> str:
    name = p.metavar or p.name.upper()
    if name.startswith("["):
        return str(name)
    shown = f"{name}..." if p.nargs == -1 else name
    return shown if p.required else f"[{shown}]"


def _row(p: Any) -> list[str]:
    if p.param_type_name == "argument":
        left = f"`{_metavar(p)}`"
    else:
        flags = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
        left = flags if p.is_flag else f"{flags} `{p.metavar or _type(p)}`"
    shown = "required" if p.required else "" if p.default in (None, False, (), []) else describe_value(p.default)
    return [left, _sentence(p.help), shown]


def _type(p: Any) -> str:
    """What an option takes, from its annotation: VALUE, NUMBER, PATH or the choices."""
    annotation = getattr(getattr(p, "type_descriptor", None), "annotation", str)
    while typing.get_origin(annotation) not in (None, typing.Literal):
        annotation = next((a for a in typing.get_args(annotation) if a is not type(None)), str)
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    return {"int": "NUMBER", "float": "NUMBER", "Path": "PATH"}.get(getattr(annotation, "__name__", ""), "VALUE")


def _sentence(text: str | None) -> str:
    return re.sub(r"<[^>]*>", lambda m: f"`{m[0]}`", inline(text or ""))


def _first(text: str | None) -> str:
    return inspect.cleandoc(text or "").split("\n\n")[0].replace("\n", " ")


def _prose(text: str) -> str:
    r"""Help text as Markdown: a paragraph marked by ``\b`` keeps its lines, its indented ones become a block of commands."""
    out = []
    for paragraph in re.split(r"\n\s*\n", _dedent(text)):
        kept = paragraph.removeprefix("\b\n").strip("\n")
        if not paragraph.startswith("\b"):
            out.append(" ".join(kept.split()))
            continue
        blocks: list[str] = []
        literal: list[str] = []
        for line in kept.split("\n"):
            if line.startswith("  "):
                literal.append(line[2:])
                continue
            if literal:
                blocks.append(code("\n".join(literal), "sh"))
                literal = []
            blocks.append(line)
        if literal:
            blocks.append(code("\n".join(literal), "sh"))
        out.append(re.sub(r"\n```\n(?=\S)", "\n```\n\n", "\n".join(blocks).replace("\n```sh", "\n\n```sh")))
    return "\n\n".join(p for p in out if p.strip())


def _dedent(text: str) -> str:
    """Remove the common margin, also where the first line has none and marks stand alone."""
    return inspect.cleandoc(text.replace("\f", ""))


def _exit_codes() -> str:
    return markdown(inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2])


_CLASSES = (
    ("Unlearning", "expunge.pipeline.config", "UnlearnConfig", ""),
    ("Training", "expunge.pipeline.config", "TrainConfig", ""),
    ("Text", "expunge.pipeline.config", "TextConfig", "text."),
    ("Engine", "expunge.engine.options", "Engine", "engine."),
    ("Audit: what is compared", "expunge.pipeline.audit", "AuditConfig", ""),
    ("Audit: what is measured", "expunge.audit.settings", "AuditSettings", ""),
)  #: heading, module, class, prefix of its keys on the command line


def _settings() -> str:
    blocks = [
        "The same typed objects serve Python, YAML (`--config FILE`) and the command line (`key=value`, dotted keys nest). An "
        "unknown key or a value out of range is refused before anything starts. The parameters of methods are on the pages of "
        "their [parts](../parts/index.md), those of the verdict [here](verdict.md#thresholds).",
    ]
    for heading, module, name, prefix in _CLASSES:
        cls = getattr(importlib.import_module(module), name)
        blocks += [f"## {heading}", inline(inspect.cleandoc(cls.__doc__ or "")), parameters(cls, prefix=prefix)]
    return page("Settings", *blocks)


def _verdict() -> str:
    """How the verdict is reached: the module's own words, and every threshold."""
    return page(
        "How the verdict is reached",
        markdown(inspect.cleandoc(verdict.__doc__ or "")),
        "## Thresholds",
        inline(inspect.cleandoc(verdict.Thresholds.__doc__ or "")),
        parameters(verdict.Thresholds),
        "What the verdicts mean and what they do not say: [the verdict](../concepts/verdict.md).",
    )


def _python() -> str:
    blocks = [
        "What `import expunge` offers. Everything else is imported from its module; names with leading underscores are internal.",
    ]
    for name in sorted(getattr(expunge, "__all__", ()), key=str.lower):
        obj = getattr(expunge, name)
        if inspect.ismodule(obj) or name.startswith("__"):
            continue
        blocks.append(f"## `{name}` {{ #{name} }}")
        if inspect.isclass(obj):
            blocks.append(f"Class in `{obj.__module__}`.")
            blocks.append(markdown(inspect.cleandoc(obj.__doc__ or "")))
            blocks += list(_methods(obj))
        elif callable(obj):
            blocks.append(code(f"expunge.{name}{signature(obj)}", "python"))
            blocks.append(markdown(inspect.cleandoc(obj.__doc__ or "")))
        else:
            blocks.append(f"A `{type(obj).__name__}` in `expunge`.")
    return page("Python", *blocks)


def _methods(cls: type) -> Iterator[str]:
    if issubclass(cls, Settings):
        yield parameters(cls)
        return
    rows = []
    for name, member in vars(cls).items():
        if name.startswith("_") or not callable(getattr(cls, name, None)) or not getattr(member, "__doc__", None):
            continue
        rows.append([f"`{name}{signature(getattr(cls, name))}`", inline(inspect.cleandoc(member.__doc__ or "").split("\n\n")[0])])
    if rows:
        yield table(["method", "what it does"], rows)
