"""The page of a bundle in a real browser: narrow and wide, light and dark, with its script and on paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from pages import documents_of, enrich, page_of, widen

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = (360, 500, 768, 1100)
Browse = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1200,1000"),
)

LAYOUT = """
const measured = {};
for (const frame of document.querySelectorAll("iframe")) {
  const inner = frame.contentDocument, root = inner.documentElement;
  inner.querySelectorAll("details").forEach(one => one.open = true);
  const boxed = one => one.parentElement.closest(".scroll, pre, svg");
  const shown = [...inner.body.querySelectorAll("*")].filter(one => one.checkVisibility() && one.tagName !== "OPTION");
  const outside = shown.filter(one => !boxed(one) && one.getBoundingClientRect().right > root.clientWidth + 1);
  const words = [...inner.querySelectorAll("td.w:first-child")].flatMap(cell => [...cell.childNodes])
    .filter(one => one.nodeType === 3);
  const lines = word => {
    const range = inner.createRange();
    range.selectNodeContents(word);
    return new Set([...range.getClientRects()].map(box => box.top)).size;
  };
  const labels = shown.filter(one => one.tagName === "text").map(one => {
    const svg = one.ownerSVGElement, box = one.getBoundingClientRect(), whole = svg.getBoundingClientRect();
    return {
      words: one.textContent,
      size: parseFloat(getComputedStyle(one).fontSize) * whole.width / svg.viewBox.baseVal.width,
      out: Math.max(whole.left - box.left, box.right - whole.right, box.bottom - whole.bottom, whole.top - box.top),
    };
  });
  measured[frame.width] = {
    inner: frame.contentWindow.innerWidth,
    scroll: root.scrollWidth,
    outside: outside.map(one => one.outerHTML.slice(0, 80)),
    broken: words.filter(one => !/\\s/.test(one.data) && lines(one) > 1).map(one => one.data),
    small: labels.filter(label => label.size < 9),
    clipped: labels.filter(label => label.out > 4),
    labels: labels.length,
  };
}
"""

CHOOSER = """
const select = document.getElementById("layer");
const shown = () => [...document.querySelectorAll(".layer-maps")].filter(one => one.checkVisibility())
  .map(one => one.dataset.layer);
const measured = {chooser: select.checkVisibility(), before: shown(), after: []};
for (const option of select.options) {
  select.value = option.value;
  select.dispatchEvent(new Event("change"));
  measured.after.push(shown());
}
measured.loaded = performance.getEntriesByType("resource").map(one => one.name);
"""

COLOURS = """
const style = getComputedStyle(document.documentElement), probe = document.createElement("i");
document.body.append(probe);
const measured = {};
for (const name of ["ink", "soft", "good", "bad", "one", "two", "three", "paper", "panel"]) {
  probe.style.color = style.getPropertyValue("--" + name);
  measured[name] = getComputedStyle(probe).color.match(/[0-9]+/g).map(Number);
}
measured.body = getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number);
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Run the browser on a file with more flags; what it prints."""
    profile = tmp_path_factory.mktemp("browser")

    def run(file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    return run


@pytest.fixture(scope="module")
def pages(tiny_bundle: Path) -> dict[str, str]:
    return {
        "tiny": (tiny_bundle / "report.html").read_text(encoding="utf-8"),
        "rich": page_of(enrich(documents_of(tiny_bundle))),
        "wide": page_of(widen(enrich(documents_of(tiny_bundle)))),
    }


def measured(browse: Browse, folder: Path, page: str, script: str, *flags: str) -> Any:
    """What ``script`` puts into ``measured`` when it runs at the end of ``page``."""
    file = folder / "measured.html"
    ends = f'addEventListener("load", () => {{{script} document.body.dataset.measured = JSON.stringify(measured); }});'
    file.write_text(page.replace("</body></html>", f"<script>{ends}</script></body></html>"), encoding="utf-8")
    found = re.search(r'data-measured="([^"]*)"', browse(file, "--dump-dom", *flags).stdout)
    assert found is not None, "the script failed"
    return json.loads(unescape(found[1]))


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What stands on the console."""
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_it_opens_from_a_file_and_the_console_stays_empty(browse: Browse, tiny_bundle: Path) -> None:
    result = browse(tiny_bundle / "report.html", "--dump-dom", "--enable-logging=stderr")
    assert "<h1>bottleneck-1-2: tiny.foldgroup</h1>" in result.stdout
    assert said(result) == []


def test_an_error_would_be_on_the_console(browse: Browse, pages: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "broken.html"
    file.write_text(pages["tiny"].replace("const choose =", "nothing.here; const choose ="), encoding="utf-8")
    (line,) = said(browse(file, "--dump-dom", "--enable-logging=stderr"))
    assert "nothing is not defined" in line


@pytest.mark.parametrize("which", ["tiny", "rich", "wide"])
def test_nothing_is_cut_off_too_small_or_broken_within_a_word(
    browse: Browse, pages: dict[str, str], which: str, tmp_path: Path
) -> None:
    frames = "".join(f'<iframe width={n} height=900 srcdoc="{escape(pages[which])}"></iframe>' for n in WIDTHS)
    wrapper = f"<!DOCTYPE html><html><head><style>iframe {{ border: 0 }}</style></head><body>{frames}</body></html>"
    found = measured(browse, tmp_path, wrapper, LAYOUT)
    assert list(found) == [str(width) for width in WIDTHS]
    for width, layout in found.items():
        assert layout["inner"] == int(width)
        assert layout["scroll"] <= layout["inner"], f"the page scrolls sideways at {width}: {layout['outside']}"
        assert layout["outside"] == [], width
        assert layout["broken"] == [], width
        assert layout["small"] == [], width
        assert layout["clipped"] == [], width
        assert layout["labels"] > 20


def test_the_chooser_shows_the_maps_of_one_layer(browse: Browse, pages: dict[str, str], tmp_path: Path) -> None:
    found = measured(browse, tmp_path, pages["rich"], CHOOSER)
    names = ["layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2"]
    assert found["chooser"]
    assert found["before"] == names[:1]
    assert found["after"] == [[name] for name in names]
    assert found["loaded"] == []


def test_without_its_script_all_maps_are_shown(browse: Browse, pages: dict[str, str], tmp_path: Path) -> None:
    page = re.sub(r"<script>.*?</script>", "", pages["rich"], flags=re.DOTALL)
    script = CHOOSER.replace("select.options", "[]")
    found = measured(browse, tmp_path, page, script)
    assert not found["chooser"]
    assert found["before"] == ["layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2"]


def luminance(colour: list[int]) -> float:
    """As WCAG 2 defines it."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_legible_by_day_and_by_night(
    browse: Browse, pages: dict[str, str], dark: bool, tmp_path: Path
) -> None:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = measured(browse, tmp_path, pages["tiny"], COLOURS, scheme)
    assert found["body"] == found["paper"]
    assert (luminance(found["paper"]) < 0.1) == dark

    def contrast(name: str, ground: str) -> float:
        low, high = sorted((luminance(found[name]), luminance(found[ground])))
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "panel"):
        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "soft", "good", "bad", "one"))
    assert all(contrast(name, "paper") >= 3 for name in ("one", "two", "three"))


def headings(pdf: bytes) -> list[str]:
    """Titles in the outline of a PDF file, which has the headings that were printed."""
    strings = re.findall(rb"/Title (\((?:\\.|[^\\)])*\)|<[0-9A-Fa-f]*>)", pdf)
    return [
        bytes.fromhex(text[1:-1].decode()).decode("utf-16")
        if text.startswith(b"<")
        else re.sub(rb"\\(.)", rb"\1", text[1:-1]).decode("latin-1")
        for text in strings
    ]


def test_paper_has_every_section_every_map_and_what_is_folded_away(
    browse: Browse, pages: dict[str, str], tmp_path: Path
) -> None:
    file, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    page = pages["wide"].replace("</summary>", "</summary><h3>folded away</h3>")
    file.write_text(page.replace("</body>", "<h3 hidden>never shown</h3></body>"), encoding="utf-8")
    browse(file, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", "--generate-pdf-document-outline")
    content = pdf.read_bytes()
    printed = headings(content)
    names = re.findall(r'data-layer="([^"]*)"', pages["wide"])
    assert len(names) == 61 and set(names) <= set(printed)
    assert set(re.findall(r"<h2>([^<]*)</h2>", pages["wide"])) <= set(printed)
    assert printed.count("folded away") == pages["wide"].count("<details>") == 2
    assert "never shown" not in printed
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 10  # sixty-one layers, six to a page
