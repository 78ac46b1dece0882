"""Searches on the page: every figure with its numbers, strangers' words as text, and nothing where there is none."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from harness import durable, studies
from harness.contracts import Row
from harness.report import page
from harness.report.studies import view, views

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</title></svg><b>{{ 7 * 7 }}&amp;"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_ROWS = pd.DataFrame(columns=list(Row.model_fields))


@pytest.fixture(scope="module")
def searched(planted_study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    planted_study.plant(folder, "planted", ("sc", "simclr"), 16)
    planted_study.write(folder, "planted", seeds=6, agreement=0.1)
    planted_study.plant(folder, "two-aims", ("sc",), 12, objectives=("knn.top1", "cost"), pruned=0)
    planted_study.write(folder, "two-aims", seeds=2)
    planted_study.plant(folder, "few", ("sc",), 4)
    planted_study.write(folder, "few", seeds=0)
    return folder


@pytest.fixture(scope="module")
def html(searched: Path) -> str:
    return page.render([], NO_ROWS, searched)


def section(html: str, name: str) -> str:
    found = re.search(rf'<section class="study">\s*<h3>{name}</h3>.*?</section>', html, re.S)
    assert found, name
    return found[0]


def test_every_search_has_its_figures_each_with_its_table(html: str) -> None:
    assert html.count('<section class="study">') == 3 and '<a href="#searches">' in html
    found = section(html, "planted")
    titles = re.findall(r"<figcaption><b>(.*?)\.</b>", found)
    assert titles == [
        "Optimisation history",
        "Expected best against trials",
        *["Importance", "Parallel coordinates", "Slices"] * 2,
    ]
    charts = re.findall(r'<svg class="chart".*?</svg>', found, re.S)
    assert len(charts) == len(titles) == found.count("<details><summary>Table</summary>")
    assert all('role="img" aria-label="' in chart for chart in charts)


def test_the_table_compares_default_and_tuned_with_its_interval(html: str, searched: Path) -> None:
    found = section(html, "planted")
    for one in studies.read(studies.read_search(searched, "planted")).methods:
        assert one.confirmed is not None and one.confirmed.gap is not None and one.confirmed.gap.low is not None
        assert f"{100 * one.confirmed.gap.mean:+.2f}" in found and f"{100 * one.confirmed.gap.low:+.2f} to " in found
        assert (
            f"{100 * one.confirmed.mean('default'):.2f}" in found
            and f"{100 * one.confirmed.mean('tuned'):.2f}" in found
        )
    assert "not judged" in section(html, "few") and "no interval" in section(html, "two-aims")


def test_a_reader_is_warned_where_rungs_and_ends_disagree(html: str) -> None:
    assert section(html, "planted").count("Spearman +0.10") == 2 and "Spearman" not in section(html, "two-aims")


def test_too_few_trials_have_no_importance_and_say_so(html: str) -> None:
    found = section(html, "few")
    assert "3 completed trials: too few, 10 are needed" in found and "Importance.</b>" not in found


def test_several_objectives_show_their_pareto_set(html: str, searched: Path) -> None:
    one = studies.read(studies.read_search(searched, "two-aims")).methods[0]
    front = section(html, "two-aims").split("Pareto set.")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">(\d+)</th>', front) == [str(number) for number in one.pareto] and one.pareto


def test_a_page_is_about_searches_on_its_own_data_sets(searched: Path) -> None:
    assert len(views(searched, {}, {"digits", "mnist"})) == 3 and views(searched, {}, {"mnist"}) == []


def test_a_page_without_a_search_has_no_such_section(tmp_path: Path) -> None:
    html = page.render([], NO_ROWS, tmp_path)
    assert 'id="searches"' not in html and "#searches" not in html


def test_a_search_of_nothing_but_failures_is_shown(searched: Path) -> None:
    document = studies.read_search(searched, "few")
    for trial in document["methods"]["sc"]["trials"]:
        trial.update(state="FAIL", values=None, reason="NONFINITE", intermediate={})
    found = view(studies.read(document | {"study": "failed"}), {})
    assert found.plates == [] and found.methods[0].plates == [] and found.lines[0].trials == "4 failed (NONFINITE 4)"


class Tags(HTMLParser):
    """Every element, and whether all are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def plant_hostile(searched: Path, workspace: Path) -> None:
    """The same search with HOSTILE as its name and in every other text of it."""
    text = json.dumps(studies.read_search(searched, "planted"))
    bad = json.dumps(HOSTILE)[1:-1]
    for word in ("planted", "sc", "optim.lr", "method.temperature", "cosine", "NONFINITE", "after 1 epochs", "digits", "qmc", "asha",
                 "all", "trials=16 binds"):  # fmt: skip
        text = text.replace(f'"{word}"', f'"{bad}{word}"')
    durable.write_sealed(studies.study_folder(workspace, "hostile") / "tuning.json", json.loads(text))


def test_strangers_words_stay_text(searched: Path, html: str, tmp_path: Path) -> None:
    plant_hostile(searched, tmp_path)
    found = page.render([], NO_ROWS, tmp_path)
    parsed = Tags(found)
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in Tags(html).tags}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    for word in ("planted", "sc", "optim.lr", "method.temperature", "cosine", "NONFINITE"):
        assert HOSTILE + word in parsed.text, word
    assert "49" not in re.findall(r"onerror=alert\(2\)&gt;.{0,80}", found)[0]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_searches_load_alone_and_fit(searched: Path, tmp_path: Path, width: int, scheme: Any) -> None:
    """In chromium, with and without hostile words: no request, no console error, nothing wider than the window."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    plant_hostile(searched, tmp_path / "bad")
    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless"])
        for workspace in (searched, tmp_path / "bad"):
            file = tmp_path / f"{workspace.name}.html"
            page.write([], NO_ROWS, workspace, file)
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
            tab = context.new_page()
            tab.on("console", lambda message: complaints.append(message.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on(
                "request",
                lambda request, own=file.as_uri(): requests.append(request.url) if request.url != own else None,
            )
            tab.goto(file.as_uri())
            assert tab.locator("section.study svg.chart").count() >= 8
            tab.locator("section.study details summary").first.focus()
            tab.keyboard.press("Enter")
            assert tab.locator("section.study details table").first.is_visible()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            context.close()
        browser.close()
    assert requests == [] and complaints == []
