"""The page at `/` in a headless Chromium: what it shows of a verdict, and that no text of a prompt becomes part of the page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from served import KnownGuard, Served, load_known, serving

from guardtrain.serve.settings import ServeSettings

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
KEY = "the-key"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def server(known_guard: KnownGuard) -> Iterator[Served]:
    with serving(load_known(known_guard), ServeSettings(api_key=KEY)) as served:
        yield served


@pytest.fixture(scope="module")
def page(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(server.url)
        yield opened


def judge(page: Page, text: str, mode: str = "") -> None:
    page.run(f"at('prompt').value = {json.dumps(text)}; at('mode').value = {json.dumps(mode)}; at('decision').textContent = '';")
    page.run("at('form').requestSubmit()")
    page.until("at('decision').textContent !== '' && !at('send').disabled")


def shown(page: Page, name: str) -> str:
    return str(page.run(f"at({json.dumps(name)}).innerText"))


def test_it_asks_for_a_key_and_then_judges(page: Page, known_guard: KnownGuard) -> None:
    judge(page, known_guard.attack)
    assert shown(page, "decision") == "no verdict"
    assert page.run("getComputedStyle(at('keyed')).display") != "none"
    page.problems.clear()  # of the 401
    page.run(f"at('key').value = {json.dumps(KEY)}")
    judge(page, known_guard.harmless)
    assert shown(page, "decision") == "benign"
    assert page.run("at('fill').className") == "benign"
    assert float(page.run("at('fill').getBoundingClientRect().right")) <= float(
        page.run("at('mark').getBoundingClientRect().right")
    )


def test_the_reason_of_a_block_follows(page: Page, server: Served, known_guard: KnownGuard) -> None:
    judge(page, known_guard.attack)
    assert shown(page, "decision") == "malicious"
    reason = server.guard.check(known_guard.attack, mode="on").reason
    page.until("!at('reason').textContent.startsWith('Asking')")
    assert page.run("at('reason').textContent") == (reason or "The reason cannot be had.")
    facts = shown(page, "facts")
    for word in ("score", "threshold", "p(malicious)", "off", "latency", "ms", server.guard.threshold_version):
        assert word in facts


def test_a_prompt_is_never_markup(page: Page) -> None:
    judge(page, MARKUP, mode="on")
    assert page.run("document.querySelectorAll('img, script').length") == 1  # its own script
    assert page.problems == []


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_narrow_and_wide_windows(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    """Pictures for people to look at: GUARDTRAIN_PICTURES names a folder for them."""
    folder = Path(os.environ.get("GUARDTRAIN_PICTURES", tmp_path))
    page.picture(folder / f"page-{width}-{'dark' if dark else 'light'}.png", width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("getComputedStyle(document.body).backgroundColor") == ("rgb(22, 24, 27)" if dark else "rgb(246, 245, 242)")


def test_no_word_of_the_page_makes_markup_of_text() -> None:
    source = (Path(__file__).parents[2] / "guardtrain" / "serve" / "page.html").read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"):
        assert word not in source
