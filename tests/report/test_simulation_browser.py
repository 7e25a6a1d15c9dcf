"""The page of a simulation in a browser: nothing is requested, strategies can be switched on, narrow screens do not scroll."""

from __future__ import annotations

from typing import Any

import pytest

from ctc_ray.report.simulation_page import run_simulation_report

pytestmark = pytest.mark.browser


def _open(browser: Any, simulated: Any, **settings: Any) -> tuple[Any, list[str], list[str]]:
    run_simulation_report(str(simulated.place))
    page = browser.new_context(**settings).new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((simulated.place / "report.html").as_uri(), timeout=180_000)
    return page, said, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opened_in_a_browser_asks_for_nothing_and_complains_of_nothing(
    simulated: Any, browser: Any, scheme: str
) -> None:
    page, said, asked = _open(browser, simulated, color_scheme=scheme)
    assert said == []
    assert [url for url in asked[1:] if not url.startswith("data:")] == []
    assert page.locator("main > section > h2").count() == 5
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 251, 250)") == (scheme == "light")


def test_page_strategy_that_is_checked_gets_its_colour_in_its_figure_alone(simulated: Any, browser: Any) -> None:
    page, _, _ = _open(browser, simulated)
    figures = page.locator(".curves")
    box = figures.nth(0).get_by_label("margin", exact=True)
    assert not box.is_checked()
    number = box.get_attribute("class")

    def width(figure: int) -> str:
        line = figures.nth(figure).locator(f".arm.{number} .line").first
        return str(line.evaluate("line => getComputedStyle(line).strokeWidth"))

    assert (width(0), width(1)) == ("1px", "1px")
    box.focus()
    page.keyboard.press("Space")
    assert (width(0), width(1)) == ("2.2px", "1px")
    box.uncheck()
    assert width(0) == "1px"


def test_page_narrow_screen_needs_no_sideways_scrolling(simulated: Any, browser: Any) -> None:
    page, _, _ = _open(browser, simulated, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_page_wide_screen_shows_the_comparison_whole(simulated: Any, browser: Any) -> None:
    page, _, _ = _open(browser, simulated, viewport={"width": 1280, "height": 900})
    hidden = "(box) => box.scrollWidth - box.clientWidth"
    boxes = page.locator("#comparison .scroll, #table1 .scroll")
    assert boxes.count() >= 4
    assert [boxes.nth(n).evaluate(hidden) for n in range(boxes.count())] == [0] * boxes.count()
