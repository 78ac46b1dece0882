"""The page in chromium with the network cut: no request, no console error; sorting, filtering and the map by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.report import assembly, page

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def address(workspace: Path, rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    page.write(assembly.build(rows), rows, workspace, file)
    return file.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless"])
        yield started
        started.close()


class Visit:
    """One opened page; `requests` are those beyond the file itself, `complaints` errors and refusals of the policy."""

    def __init__(self, browser: Any, address: str, width: int = 1280, **context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **context)
        self.context.route("**/*", self._note(address))
        self.tab = self.context.new_page()
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(address)

    def _note(self, address: str) -> Any:
        def handle(route: Any) -> None:
            if route.request.url != address and not route.request.url.startswith("data:"):
                self.requests.append(route.request.url)
            route.continue_()

        return handle

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.tab.locator(selector).all_inner_texts()
        return found


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    made = Visit(browser, address)
    yield made
    assert made.requests == [] and made.complaints == []
    made.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_loads_alone_and_fits(browser: Any, address: str, scheme: str, width: int) -> None:
    made = Visit(browser, address, width, color_scheme=scheme)
    assert made.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert made.tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert made.requests == [] and made.complaints == []
    made.context.close()


def test_it_can_be_read_without_a_script(browser: Any, address: str) -> None:
    made = Visit(browser, address, java_script_enabled=False)
    assert made.tab.locator(".board").first.is_visible() and not made.tab.locator("#controls").is_visible()
    assert made.tab.locator(".board").count() == 2 and "sc" in made.tab.locator(".board").last.inner_text()
    made.context.close()


def test_the_policy_refuses_a_planted_script(visit: Visit) -> None:
    planted = "const e = document.createElement('script'); e.textContent = 'window.owned = 1'; document.body.append(e); window.owned"
    assert visit.tab.evaluate(planted) is None
    assert any("Content Security Policy" in text for text in visit.complaints)
    visit.complaints.clear()


def test_a_column_sorts_both_ways_by_keyboard(visit: Visit) -> None:
    head = visit.tab.locator(".board table").first.locator("thead th").nth(1)

    def values() -> list[float]:
        cells = visit.tab.locator(".board table").first.locator("tbody tr td:nth-child(2)")
        return [float(cells.nth(k).get_attribute("data-v")) for k in range(cells.count())]

    assert len(values()) == 3
    head.locator("button").focus()
    visit.tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and values() == sorted(values(), reverse=True)
    visit.tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending" and values() == sorted(values())


def test_boards_and_rows_are_filtered_by_keyboard(visit: Visit) -> None:
    shown = visit.tab.locator(".board:visible")
    assert shown.count() == 2
    labels = visit.tab.locator("select[data-field=labels]")
    labels.focus()
    visit.tab.keyboard.press("ArrowDown")
    assert shown.count() == 1 and visit.tab.locator("#shown").inner_text() == "1 of 2 boards"
    visit.tab.locator("#words").focus()
    visit.tab.keyboard.type("Spatial")
    visible = visit.tab.locator(".board:visible table").first.locator("tbody tr:visible")
    assert visible.count() == 1 and "sc" in visible.inner_text()
    visit.tab.keyboard.type(" nothing of that kind")
    assert shown.count() == 0


def test_a_link_to_a_run_opens_it(visit: Visit) -> None:
    link = visit.tab.locator(".board td a").first
    target = link.get_attribute("href")
    link.click()
    assert visit.tab.locator(f"{target} .body").is_visible()
    assert "harness run" in visit.tab.locator(f"{target} pre").first.inner_text()


def test_the_map_shows_the_image_behind_a_dot(visit: Visit) -> None:
    figure = visit.tab.locator(".featuremap").first
    figure.scroll_into_view_if_needed()
    figure.locator("svg.map").first.hover()
    figure.locator("svg.map").first.focus()
    picture = "(f) => f.querySelector('canvas').toDataURL()"
    seen = []
    for _ in range(3):
        visit.tab.keyboard.press("ArrowRight")
        text = figure.locator("output").inner_text()
        assert text.startswith("image ")
        seen.append((text, visit.tab.evaluate(picture, figure.element_handle())))
    assert len({pixels for _, pixels in seen}) == 3
    # the tile of the sheet that belongs to the image the text names
    index = int(seen[-1][0].split()[1]) - 1
    expected = visit.tab.evaluate(
        "([f, i]) => { const s = f.querySelector('img.sheet'), d = JSON.parse(f.querySelector('script').textContent);"
        " const t = s.naturalWidth / d.columns, c = document.createElement('canvas'); c.width = c.height = t;"
        " c.getContext('2d').drawImage(s, -(i % d.columns) * t, -Math.floor(i / d.columns) * t);"
        " return c.toDataURL(); }",
        [figure.element_handle(), index],
    )
    assert seen[-1][1] == expected
