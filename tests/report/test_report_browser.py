from __future__ import annotations

from typing import Any

import pytest

from ctc_ray.cohort import Cohort

pytestmark = [pytest.mark.browser, pytest.mark.ray]


def _open(browser: Any, cohort: Cohort, **settings: Any) -> tuple[Any, list[str], list[str]]:
    """Open the report; returns the page, what the console said, and what was requested."""
    context = browser.new_context(**settings)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    path = cohort.store.local_path(f"{cohort.report('report')}/report.html")
    page.goto(path.as_uri(), timeout=180_000)
    page.wait_for_selector("#map-plot[data-drawn]", timeout=180_000)
    return page, said, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_opened_in_a_browser_draws_the_map_without_errors_or_requests(
    finished: Any, browser: Any, scheme: str
) -> None:
    page, said, asked = _open(browser, finished.cohort, color_scheme=scheme)
    assert said == []
    assert [url for url in asked[1:] if not url.startswith(("data:", "blob:"))] == []
    assert int(page.get_attribute("#map-plot", "data-drawn")) > 0
    assert page.locator("#map-plot .legend .traces").count() >= 4
    assert page.locator("h1").count() == 1
    assert page.locator("main > section > h2").count() == 14
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_report_colour_choice_changes_the_legend(finished: Any, browser: Any) -> None:
    page, said, _ = _open(browser, finished.cohort)
    page.get_by_label("role", exact=True).check()
    page.wait_for_function("document.querySelector('#map-plot .legend').textContent.includes('final')")
    page.get_by_label("probability", exact=True).check()
    page.wait_for_function("document.querySelector('#map-plot .infolayer').textContent.includes('probability')")
    assert said == []


def test_report_narrow_screen_needs_no_sideways_scrolling(finished: Any, browser: Any) -> None:
    page, _, _ = _open(browser, finished.cohort, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_report_keyboard_reaches_content_and_controls(finished: Any, browser: Any) -> None:
    page, _, _ = _open(browser, finished.cohort)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.get_by_label("cluster", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "label"
