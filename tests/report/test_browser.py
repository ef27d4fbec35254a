"""The report in a real browser: no console message, no sideways scrolling, tables that sort."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from expunge.audit.document import AuditDocument
from expunge.report.html import html

from . import factory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

PROBE = """<script>
const root = document.documentElement;
document.querySelectorAll("details").forEach((part) => (part.open = true));
const spills = (e) => !e.closest("svg, .scroll, figure") && e.getBoundingClientRect().right > innerWidth;
const wide = [...document.querySelectorAll("main *")].filter(spills);
const table = document.querySelector("table.sortable");
const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent.includes("Answer probability"));
table.tHead.rows[0].cells[column].querySelector("button").click();
const sorted = [...table.tBodies[0].rows].map((r) => Number(r.cells[column].dataset.sort));
const rising = sorted.every((v, i) => !i || sorted[i - 1] <= v);
root.dataset.probe = [root.scrollWidth - root.clientWidth, wide.length, rising, sorted.length].join(" ");
root.dataset.wide = wide.slice(0, 5).map((e) => e.tagName + "." + e.className + ":" + e.textContent.slice(0, 40)).join("; ");
</script>"""


def open_page(text: str, folder: Path, width: int) -> tuple[str, str]:
    """The page after its scripts ran, and what the browser logged."""
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=90, check=True, env={**os.environ}
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("document", [factory.document(), factory.full()], ids=["one", "many"])
def test_quiet_console_and_the_policy_lets_our_script_run(document: AuditDocument, tmp_path: Path) -> None:
    shown, log = open_page(html([document]), tmp_path, 1280)
    assert "CONSOLE" not in log, log
    assert 'class="sort"' in shown


@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize("document", [factory.document(), factory.full()], ids=["one", "many"])
def test_no_sideways_scrolling_and_sorting_works(document: AuditDocument, width: int, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html([document])).replace("</body>", PROBE + "</body>")
    shown, _ = open_page(text, tmp_path, width)
    probe = re.search(r'data-probe="(-?\d+) (\d+) (\w+) (\d+)"', shown)
    assert probe, "the probe ran"
    wide = re.search(r'data-wide="([^"]*)"', shown)
    assert probe.groups() == ("0", "0", "true", str(len(document.models))), wide and wide[1]


def test_the_policy_stops_a_foreign_script(tmp_path: Path) -> None:
    text = html([factory.document()]).replace("</body>", "<script>document.title = 'run'</script></body>")
    shown, log = open_page(text, tmp_path, 1280)
    assert "<title>run" not in shown
    assert "Content Security Policy" in log
