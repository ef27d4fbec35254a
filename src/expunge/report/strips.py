"""Small drawings inside tables: an interval against its margin."""

from __future__ import annotations

from expunge.core.results import Check
from expunge.report.text import signed

_WIDTH, _HEIGHT, _PAD = 190, 30, 8


def margin_strip(check: Check) -> str:
    """An SVG of the difference with its interval, zero and the band of the margin; empty where nothing was measured.

    Filled where the check came out equivalent, hollow where it did not. The band is the margin to either side, though some
    checks accept more on the side that does not count against the model. The scale is at least 1.6 margins to either side,
    and wide enough for the interval.
    """
    if check.difference is None:
        return ""
    low = check.difference if check.low is None else check.low
    high = check.difference if check.high is None else check.high
    margin = check.margin or 0.0
    reach = max(1.6 * margin, 1.08 * abs(low), 1.08 * abs(high), abs(check.difference), 1e-12)

    def x(value: float) -> str:
        return f"{_WIDTH / 2 + value / reach * (_WIDTH / 2 - _PAD):.1f}"

    middle = _HEIGHT / 2
    parts = [f'<line class="axis" x1="{_PAD}" x2="{_WIDTH - _PAD}" y1="{middle}" y2="{middle}"/>']
    if margin:
        width = 2 * margin / reach * (_WIDTH / 2 - _PAD)
        parts.append(f'<rect class="margin" x="{x(-margin)}" y="4" width="{width:.1f}" height="{_HEIGHT - 8}"/>')
    parts.append(f'<line class="zero" x1="{_WIDTH / 2}" x2="{_WIDTH / 2}" y1="4" y2="{_HEIGHT - 4}"/>')
    mark = "in" if check.outcome == "equivalent" else "out"
    parts.append(f'<line class="span {mark}" x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<circle class="dot {mark}" cx="{x(check.difference)}" cy="{middle}" r="4"/>')
    label = (
        f"{check.outcome}: difference {signed(check.difference)}, interval {signed(low)} to {signed(high)}, margin {margin:.3g}"
    )
    return f'<svg class="strip" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
