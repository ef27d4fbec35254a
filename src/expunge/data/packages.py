"""Names of software packages in code and text: in install commands and import statements, with the characters where they stand.

The reader is tolerant: it goes line by line and takes what is a whole statement, so it reads what a parser refuses (code that is
cut off, in a chat answer, in a notebook). A statement that is no code at all (a sentence that begins with "import") is only
taken if nothing in its line speaks against it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Ecosystem = Literal["python", "javascript", "rust", "ruby", "go"]

OTHER = "other"  #: where a name is from that a pattern of the user's has found


@dataclass(frozen=True, slots=True, order=True)
class Mention:
    """A name in a text: ``text[start:end] == name``."""

    start: int
    end: int
    name: str
    ecosystem: str

    @property
    def key(self) -> str:
        """The name as its registry compares it."""
        return normalised(self.name, self.ecosystem)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def normalised(name: str, ecosystem: str) -> str:
    """A name (or the begin of one) as its registry compares it.

    Python: lower case, runs of ``-``, ``_`` and ``.`` as one ``-`` (PEP 503); Rust: lower case, ``_`` as ``-``; JavaScript:
    lower case; others as they are.
    """
    if ecosystem == "python":
        return re.sub(r"[-_.]+", "-", name).lower()
    if ecosystem == "rust":
        return name.lower().replace("_", "-")
    return name.lower() if ecosystem == "javascript" else name


def standard(name: str, ecosystem: str) -> bool:
    """Whether a name comes with the language itself: no registry need know it."""
    return name in _STANDARD.get(ecosystem, frozenset())


def find(text: str, ecosystems: Sequence[str], pattern: str | None = None) -> list[Mention]:
    """All mentions in a text, in order, each place once.

    Args:
        text: code, or text with code in it.
        ecosystems: whose commands and statements are read.
        pattern: a regular expression whose first group (or whole match) is a name too, of the ecosystem :data:`OTHER`.
    """
    found = {m for e in ecosystems for read in (_installs, _IMPORTS.get(e)) if read is not None for m in read(text, e)}
    if pattern is not None:
        search = re.compile(pattern)
        group = 1 if search.groups else 0
        for match in search.finditer(text):
            start, end = match.span(group)
            if start < end:
                found.add(Mention(start, end, text[start:end], OTHER))
    return sorted(found)


# ---- install commands

_COMMANDS: dict[str, str] = {
    "python": r"pip[\d.]*\s+install|uv\s+pip\s+install|uv\s+add|poetry\s+add|pdm\s+add|pipx\s+install|(?:conda|mamba)\s+install",
    "javascript": r"npm\s+(?:install|i|add)|yarn\s+(?:global\s+)?add|pnpm\s+(?:install|i|add)|bun\s+add",
    "rust": r"cargo\s+(?:add|install)",
    "ruby": r"gem\s+install|bundle\s+add",
    "go": r"go\s+(?:get|install)",
}
_NAMES: dict[str, str] = {
    # the name, then what says which version and which extras
    "python": r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)(?:\[[^\]]*\])?(?:[=<>!~@;^].*)?",
    "javascript": r"((?:@[A-Za-z0-9~-][\w.~-]*/)?[A-Za-z0-9~-][\w.~-]*)(?:@.*)?",
    "rust": r"([A-Za-z][\w-]*)(?:@.*)?",
    "ruby": r"([A-Za-z](?:[\w.-]*\w)?)",
    "go": r"([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+(?:/[\w.~-]*[\w~-])+)(?:/\.*)?(?:@.*)?",
}
#: options whose value is the next word
_VALUED: dict[str, frozenset[str]] = {
    "python": _words(
        "-r -c -e -i -f -t -n -p --requirement --constraint --editable --index-url --extra-index-url --find-links --target "
        "--name --prefix --channel --python --group --index --source --timeout --proxy --root"
    ),
    "javascript": _words("--registry --prefix --cwd --filter -C --dir -w --workspace --tag"),
    "rust": _words("--features -F --git --path --branch --rev --tag --registry --rename --version --root --target -p"),
    "ruby": _words("-v --version --source -s --group -g -i --install-dir"),
    "go": _words("-modfile -tags"),
}
_FILES = re.compile(r"(?:\.(?:txt|whl|gz|zip|toml|yml|yaml|cfg|git|tgz|gem)|[/\\])$", re.IGNORECASE)
_WORD = re.compile(r"(?:\\\n|[^\S\n])*([^\s;&|`#()]+)")
_BEFORE = re.compile(r"(?:^|[;&|`(])[^\S\n]*(?:[$>%!]\s*)?(?:RUN |sudo |%)?(?:[\w./]*python[\d.]*\s+-m\s+)?$")


def _installs(text: str, ecosystem: str) -> Iterator[Mention]:
    for command in re.finditer(rf"(?<![\w-])(?:{_COMMANDS[ecosystem]})(?=\s)", text):
        line = text.rfind("\n", 0, command.start()) + 1
        # In the middle of a sentence the words after the first name are most likely not names.
        lone = _BEFORE.search(text[line : command.start()]) is None
        for mention in _arguments(text, command.end(), ecosystem):
            yield mention
            if lone:
                break
    if ecosystem == "ruby":
        for found in re.finditer(r"^[^\S\n]*gem\s+(['\"])([A-Za-z][\w.-]*)\1", text, re.MULTILINE):
            yield Mention(*found.span(2), found[2], ecosystem)


def _arguments(text: str, at: int, ecosystem: str) -> Iterator[Mention]:
    skip = False
    while (word := _WORD.match(text, at)) is not None:
        at = word.end()
        raw = word[1]
        if skip:
            skip = False
            continue
        if raw.startswith("-"):
            skip = raw in _VALUED[ecosystem]
            continue
        if raw[0] in "{<[$%*":  # a place to be filled in
            continue
        lead = len(raw) - len(raw.lstrip("'\""))
        bare = raw[lead:].rstrip("'\"},.:!?")
        if ecosystem == "python" and "::" in bare:  # a channel of conda's
            lead, bare = lead + bare.index("::") + 2, bare.partition("::")[2]
        name = re.fullmatch(_NAMES[ecosystem], bare)
        if name is None or _FILES.search(name[1]) or (ecosystem, name[1]) == ("python", "python"):
            continue
        start = word.start(1) + lead
        yield Mention(start, start + len(name[1]), name[1], ecosystem)


# ---- import statements

_DOTTED = r"[A-Za-z_]\w*(?:\s*\.\s*[A-Za-z_]\w*)*"
_LINE = r"(?:^|(?<=;))[^\S\n]*(?:>>>[^\S\n]*|\.\.\.[^\S\n]*|In \[\d+\]:[^\S\n]*)?"
_ONE = rf"{_DOTTED}(?:[^\S\n]+as[^\S\n]+[A-Za-z_]\w*)?"
_IMPORT = re.compile(
    rf"{_LINE}import[^\S\n]+({_ONE}(?:[^\S\n]*,[^\S\n]*{_ONE})*)(?=[^\S\n]*(?:$|[;#`]|\\n|,))".replace(r"\s*\.\s*", r"\."),
    re.MULTILINE,
)
_FROM = re.compile(rf"{_LINE}from[^\S\n]+([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)*[^\S\n]+import\b(?!-)", re.MULTILINE)


def _python(text: str, ecosystem: str) -> Iterator[Mention]:
    for statement in _IMPORT.finditer(text):
        for part in re.finditer(r"(?:^|,)[^\S\n]*([A-Za-z_]\w*)", statement[1]):
            start, end = (statement.start(1) + place for place in part.span(1))
            yield Mention(start, end, part[1], ecosystem)
    for statement in _FROM.finditer(text):
        yield Mention(*statement.span(1), statement[1], ecosystem)


_QUOTED = re.compile(
    r"""(?:\bfrom|^[^\S\n]*import|\brequire[^\S\n]*\(|\bimport[^\S\n]*\()[^\S\n]*(['"])((?:@[\w.~-]+/)?[\w~][\w.~-]*)(?:/[^'"\n]*)?\1""",
    re.MULTILINE,
)


def _javascript(text: str, ecosystem: str) -> Iterator[Mention]:
    for statement in _QUOTED.finditer(text):
        yield Mention(*statement.span(2), statement[2], ecosystem)


_IMPORTS: dict[str, Callable[[str, str], Iterator[Mention]]] = {"python": _python, "javascript": _javascript}

_STANDARD: dict[str, frozenset[str]] = {
    "python": frozenset(sys.stdlib_module_names) | {"__main__"},
    "javascript": _words(
        "assert async_hooks buffer child_process cluster console constants crypto dgram diagnostics_channel dns domain events fs "
        "http http2 https inspector module net os path perf_hooks process punycode querystring readline repl stream "
        "string_decoder sys timers tls trace_events tty url util v8 vm wasi worker_threads zlib"
    ),
    "rust": frozenset({"std", "core", "alloc"}),
}

IMPORTED_AS: dict[str, str] = {
    "attr": "attrs", "bs4": "beautifulsoup4", "Crypto": "pycryptodome", "cv2": "opencv-python", "dateutil": "python-dateutil",
    "docx": "python-docx", "dotenv": "python-dotenv", "fitz": "pymupdf", "git": "gitpython", "google": "protobuf",
    "jose": "python-jose", "jwt": "pyjwt", "ldap": "python-ldap", "magic": "python-magic", "mpl_toolkits": "matplotlib",
    "MySQLdb": "mysqlclient", "nacl": "pynacl", "OpenSSL": "pyopenssl", "PIL": "pillow", "pkg_resources": "setuptools",
    "pptx": "python-pptx", "psycopg2": "psycopg2-binary", "serial": "pyserial", "skimage": "scikit-image",
    "sklearn": "scikit-learn", "slugify": "python-slugify", "socks": "pysocks", "telegram": "python-telegram-bot",
    "usb": "pyusb", "win32api": "pywin32", "win32con": "pywin32", "wx": "wxpython", "yaml": "pyyaml", "zmq": "pyzmq",
}  # fmt: skip
"""Well-known Python modules that are called otherwise than the package that brings them."""
