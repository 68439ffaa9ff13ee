"""The report in a real browser: what a reader sees, on a wide screen, on a phone, in MLflow's sandbox."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs.report import write_report
from jobs.report_run import RunFolder
from tests.browser import browser_page
from tests.run_folder import simulated_run, write_run

# Contrast of every piece of text against the nearest background behind it (WCAG 2.2, 1.4.3).
_CONTRASTS = """() => {
  const parse = colour => {
    const parts = colour.match(/[\\d.]+/g).map(Number);
    return {rgb: parts.slice(0, 3), alpha: parts.length > 3 ? parts[3] : 1};
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const {rgb, alpha} = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color).rgb), luminance(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(simulated_run(impressions=30_000, days=4.0), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return write_report(folder)


def test_the_figures_of_the_run_are_on_the_page_and_nothing_is_fetched(folder: Path, report: Path) -> None:
    metrics = RunFolder.read(folder).metrics
    assert metrics is not None
    with browser_page() as browser:
        browser.page.goto(report.as_uri())
        for task in ("click", "conversion"):
            section = browser.page.locator(f"#task-{task}")
            quality = section.locator("table").first
            student = metrics[task]["by_maturity"]["mature"]["student"]
            row = quality.get_by_role("row", name="student, calibrated")
            assert row.is_visible()
            cells = row.get_by_role("cell").all_inner_texts()
            assert cells[:5] == [
                f"{student['log_loss']:.5f}",
                *(f"{student[name]:.4f}" for name in ("ne", "auc", "gauc", "pcoc")),
            ]
        assert browser.requests == [report.as_uri()]
        assert browser.problems == []


def test_every_plot_is_drawn_and_has_a_text_that_says_the_same(report: Path) -> None:
    with browser_page() as browser:
        browser.page.goto(report.as_uri())
        plots = browser.page.locator("figure img")
        assert plots.count() == 8
        for plot in plots.all():
            assert plot.evaluate("image => image.complete && image.naturalWidth > 0")
            assert len(plot.get_attribute("alt") or "") > 60


def test_a_phone_scrolls_tables_but_never_the_page_sideways(report: Path) -> None:
    with browser_page(width=390, height=844) as browser:
        browser.page.goto(report.as_uri())
        width: Any = browser.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390


@pytest.mark.parametrize("width", [390, 1280])
def test_all_text_stands_out_from_its_background(report: Path, width: int) -> None:
    with browser_page(width=width) as browser:
        browser.page.goto(report.as_uri())
        contrasts: list[tuple[float, str]] = browser.page.evaluate(_CONTRASTS)
        assert len(contrasts) > 200
        faint = [text for ratio, text in contrasts if ratio < 4.5]
        assert faint == []


def test_headings_nest_and_every_link_of_the_contents_leads_to_a_section(report: Path) -> None:
    with browser_page() as browser:
        browser.page.goto(report.as_uri())
        levels: list[int] = browser.page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3')].map(heading => Number(heading.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        links = browser.page.locator("nav a")
        assert links.count() == browser.page.locator("main section").count()
        for link in links.all():
            assert browser.page.locator(link.get_attribute("href") or "").count() == 1


def test_it_reads_without_scripts_and_in_the_sandbox_in_which_mlflow_shows_artefacts(
    folder: Path, report: Path
) -> None:
    metrics = RunFolder.read(folder).metrics
    assert metrics is not None
    shown = f"{metrics['click']['by_maturity']['mature']['student']['log_loss']:.5f}"
    with browser_page(javascript=False) as browser:
        browser.page.goto(report.as_uri())
        assert shown in browser.page.locator("#task-click").inner_text()
    with browser_page() as browser:
        browser.page.set_content('<iframe sandbox style="width:1200px;height:900px"></iframe>')
        browser.page.locator("iframe").evaluate(
            "(frame, html) => { frame.srcdoc = html; }", report.read_text()
        )
        inside = browser.page.frame_locator("iframe")
        inside.locator("#task-click table").first.wait_for()
        assert shown in inside.locator("#task-click").inner_text()
        assert inside.locator("figure img").first.evaluate(
            "image => image.decode().then(() => image.naturalWidth)"
        )
        assert browser.problems == []


def test_it_prints(report: Path) -> None:
    with browser_page() as browser:
        browser.page.goto(report.as_uri())
        pdf = browser.page.pdf(format="A4", print_background=True)
        assert pdf.startswith(b"%PDF")
        browser.page.emulate_media(media="print")
        browser.page.set_viewport_size({"width": 794, "height": 1123})
        width: Any = browser.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 794
