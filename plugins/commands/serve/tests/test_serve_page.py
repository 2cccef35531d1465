"""The chat page in a headless Chromium: it talks, stops, shows what a model says as text, and fits a phone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WICKED = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1100, "height": 800})
    faults: list[str] = []
    opened.on("pageerror", lambda err: faults.append(str(err)))
    opened.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    yield opened
    opened.close()
    assert [text for text in faults if "favicon" not in text and "status of 4" not in text] == []


def say(page: Any, text: str) -> None:
    page.fill("#said", text)
    page.press("#said", "Enter")
    page.wait_for_selector("#send:visible")


def test_it_talks_and_shows_text_as_text(page: Any, start: Any, scripted: Any, spoken: Any, tmp_path: Path) -> None:
    engine = scripted(lambda request: ["<think>", "so so", "</think>", WICKED, " done"])
    with start(engine, spoken, page=True) as server:
        page.goto(server.url)
        page.click("#open")
        page.fill("#system", "Be brief.")
        page.fill("#temperature", "0.25")
        page.click("#open")
        say(page, "Hello & <b>you</b>")
        assert page.inner_text(".turn.user .text") == "Hello & <b>you</b>"
        assert page.inner_text(".turn.assistant .text") == WICKED + " done"
        assert page.query_selector(".turn.assistant img") is None
        assert page.title() == "swift-core"
        assert page.text_content(".turn.assistant details div") == "so so"
        assert not page.is_visible(".turn.assistant details div")  # folded
        assert "tokens/s" in page.inner_text(".turn.assistant .facts")
        say(page, "Again")
        asked = engine.seen[-1]
        assert asked.temperature == 0.25
        assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "user"]
        page.screenshot(path=str(tmp_path / "talk.png"))
        page.click("#clear")
        assert page.is_visible("#empty")


def test_it_stops(page: Any, start: Any, scripted: Any) -> None:
    engine = scripted(lambda request: (piece for _ in range(500) for piece in ("word ", 0.02)))
    with start(engine, page=True) as server:
        page.goto(server.url)
        page.fill("#said", "Go on")
        page.press("#said", "Enter")
        page.wait_for_selector(".turn.assistant .text:has-text('word word word')")
        page.click("#stop")
        page.wait_for_selector("#send:visible")
        assert "stopped" in page.inner_text(".turn.assistant .facts")
        server.until(lambda: server.state.admission.running == 0)
        assert engine.closed == 1


def test_a_message_that_is_quicker_than_the_list_of_models(page: Any, start: Any, scripted: Any) -> None:
    def slowly(route: Any) -> None:
        time.sleep(0.5)
        route.continue_()

    with start(scripted(lambda request: ["here"]), page=True) as server:
        page.route("**/v1/models", slowly)
        page.goto(server.url, wait_until="commit")
        page.wait_for_selector("#said")
        page.evaluate(
            "() => { document.getElementById('said').value = 'Go on'; document.getElementById('ask').requestSubmit(); }"
        )
        page.wait_for_selector(".turn.assistant .text:has-text('here')")


def test_adapters_pictures_faults_and_keys(page: Any, start: Any, scripted: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    capabilities = frozenset({"stream", "concurrent", "media", "adapters"})
    engine = scripted(lambda request: [f"{request.adapter} {len(request.media.get('images', []))}"], capabilities=capabilities)
    with start(engine, page=True, keys=("secret",)) as server:
        server.state.adapters["red"] = tmp_path
        page.goto(server.url)
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option[value=red]", state="attached")
        page.select_option("#model", "red")
        page.set_input_files("#file", str(tmp_path / "red.png"))
        page.wait_for_selector("#preview:visible")
        say(page, "What is this?")
        assert page.inner_text(".turn.assistant .text") == "red 1"
        assert engine.seen[-1].media["images"][0].startswith("data:image/png;base64,")
        assert page.is_visible(".turn.user img")
        page.fill("#top_p", "7")
        say(page, "And now?")
        assert "top_p: Input should be less than or equal to 1" in page.inner_text(".turn .fault")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, start: Any, scripted: Any, scheme: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    with start(scripted(lambda request: ["a" * 300, " and more words " * 20]), page=True) as server:
        page = context.new_page()
        page.goto(server.url)
        page.click("#open")
        page.screenshot(path=str(tmp_path / f"settings-{scheme}.png"))
        page.click("#open")
        say(page, "Hello there, " * 6)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        dark = sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) < 200
        assert dark == (scheme == "dark")
        page.screenshot(path=str(tmp_path / f"phone-{scheme}.png"))
    context.close()
