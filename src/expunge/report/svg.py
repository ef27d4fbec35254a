"""Matplotlib figures as small, deterministic, accessible SVG for a page that already has a style.

Only the object interface is used (no pyplot, no global state besides a scoped ``rc_context``); text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from expunge.core.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1c2430"
QUIET = "#5b6472"
RULE = "#e3e6ea"
DPI = 72.0  #: matplotlib's SVG unit, so that one unit is one pixel of the page

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12.5,
    "font.family": ["DejaVu Sans"],
    "axes.edgecolor": "#98a1ae",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 12.5,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "text.color": INK,
    "xtick.color": "#98a1ae",
    "ytick.color": "#98a1ae",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.minor.visible": False,
    "legend.frameon": False,
    "legend.fontsize": 12.5,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Everything between is drawn in the report's style.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("The HTML report", "report") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the browser has the glyphs; only widths are guessed
        matplotlib.rcdefaults()  # a user's own style file must not change the evidence
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def canvas(width: float, height: float) -> Any:
    """An empty figure of ``width`` x ``height`` pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def place(figure: Figure, left: float, top: float, width: float, height: float, **options: Any) -> Any:
    """Axes whose box is given in pixels from the top left corner of ``figure``."""
    full_width, full_height = figure.get_size_inches() * DPI
    box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    return figure.add_axes(box, **options)


def at(figure: Figure, left: float, top: float) -> tuple[float, float]:
    """Figure coordinates of a point given in pixels from the top left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    return left / full_width, 1 - top / full_height


def render(figure: Figure, name: str, label: str) -> str:
    """``figure`` as an inline SVG element.

    Args:
        figure: drawn within :func:`drawing`.
        name: prefix of all ids, unique within the page.
        label: what a screen reader says in place of the drawing.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style[^>]*>.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = {a or b for a, b in re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', body)}
    body = re.sub(r"<[^>]+>", lambda tag: _renamed(tag.group(), name, used), body)
    width, height = (round(v * DPI) for v in figure.get_size_inches())
    opening = f'<svg role="img" aria-label="{_attribute(label)}" viewBox="0 0 {width} {height}" style="max-width:{width}px">'
    return opening + re.sub(r"\s*\n\s*", "\n", body[body.index(">") + 1 :]).strip()


def _renamed(tag: str, name: str, used: set[str]) -> str:
    """``tag`` with ids made unique within the page; ids that nothing refers to are dropped."""
    tag = re.sub(r'\s?\bid="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", tag)
    return re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', tag)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
