"""The demo in a real browser: Debian's Chromium, driven by Playwright.

`ACCEL_SCREENSHOTS=docs/img pytest -m slow tests/demos/test_app_browser.py` writes the pictures of
the documentation.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium"),
    pytest.mark.timeout(300),
]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
]
PATIENCE = 90_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a demo in which one visitor may wait."""
    pytest.importorskip("gradio")
    said = tmp_path_factory.mktemp("demo") / "stderr.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accel", "demo", "--port", str(port), "--queue-size", "1"]
    with said.open("w") as out:  # a pipe that nobody reads would fill and stop the server
        process = subprocess.Popen(command, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}/"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except OSError:
            assert process.poll() is None, said.read_text()
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser, server):
    """A visitor's page; what its console calls an error fails the test."""
    visit = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors = []
    visit.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    opened(visit, server)
    yield visit
    visit.close()
    assert not [error for error in errors if "503" not in error]  # 503: the queue is full


def opened(visit, url) -> None:
    visit.set_default_timeout(PATIENCE)
    visit.goto(url)
    visit.get_by_text("Ready.").wait_for()


def picture_of(page, name: str, **options) -> None:
    folder = os.environ.get("ACCEL_SCREENSHOTS")
    if folder:
        with Image.open(io.BytesIO(page.screenshot(**options))) as taken:
            few = taken.convert("RGB").quantize(96, dither=Image.Dither.NONE)
        few.save(Path(folder) / f"{name}.png", optimize=True)


def status(page) -> str:
    return page.locator("#status").inner_text()


def choose_model(page, name: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=name).click()
    page.wait_for_timeout(500)


def set_steps(page, steps: int) -> None:
    box = page.get_by_label("number input for Steps")
    box.fill(str(steps))
    box.press("Tab")


def generate(page) -> None:
    page.locator("#generate").click()
    page.locator("#status").get_by_text("Done").wait_for()


def recipe_text(page) -> str:
    lines = page.locator("#recipe .cm-line").all_inner_texts()
    return "\n".join(lines)


def wait_for_step(page) -> None:
    page.wait_for_function(
        "() => /step ([5-9]|\\d\\d) of/.test(document.querySelector('#status').innerText)"
    )


def test_generate_compares_picture_and_video(page) -> None:
    page.locator("#generate").click()
    page.get_by_text("accelerated · step").wait_for()
    wait_for_step(page)
    picture_of(page, "demo-running")
    page.get_by_text("Done:").wait_for()
    speed = float(re.search(r"Done: ([\d.]+)× faster", status(page))[1])
    assert speed > 1
    page.locator("#slider img").nth(1).wait_for()
    assert page.locator("#slider img").count() == 2
    tiles = page.locator("#figures").inner_text()
    assert "PSNR" in tiles and "speed-up" in tiles and "feature distance" in tiles
    cells = page.locator("#heat svg title")
    told = [cells.nth(index).text_content() for index in range(cells.count())]
    assert len(told) == 2 * 50
    assert any("computed, 100%" in cell for cell in told)
    assert any("0% of the work" in cell for cell in told)
    page.wait_for_timeout(500)
    picture_of(page, "demo-picture", full_page=True)

    choose_model(page, "zoo:emoji-video")
    generate(page)
    film = page.locator("#video video")
    film.wait_for()
    page.wait_for_function("() => document.querySelector('#video video').readyState >= 2")
    assert film.evaluate("it => it.videoWidth") == 2 * film.evaluate("it => it.videoHeight")
    page.wait_for_timeout(500)
    picture_of(page, "demo-video", full_page=True)

    thumbnails = page.locator("#history .thumbnail-item")
    assert thumbnails.count() == 2
    thumbnails.nth(1).click()
    page.locator("#slider img").first.wait_for()
    assert not film.is_visible()


def test_stop_ends_the_sampling_and_the_next_run_is_whole(page) -> None:
    choose_model(page, "zoo:emoji-unet")
    set_steps(page, 100)
    page.locator("#generate").click()
    page.get_by_text("accelerated · step").wait_for()
    wait_for_step(page)
    page.locator("#stop").click()
    page.get_by_text("Stopped after step").wait_for()
    step = int(re.search(r"after step (\d+) of 100", status(page))[1])
    assert 5 <= step < 100
    page.wait_for_timeout(1500)
    assert "Stopped" in status(page)
    set_steps(page, 8)
    generate(page)
    assert page.locator("#heat svg title").count() == 8


def test_closing_the_tab_frees_the_pipeline_for_the_next_visitor(browser, server, page) -> None:
    leaving = browser.new_page()
    opened(leaving, server)
    choose_model(leaving, "zoo:emoji-unet")
    set_steps(leaving, 100)
    leaving.locator("#generate").click()
    wait_for_step(leaving)
    leaving.close()
    choose_model(page, "zoo:emoji-unet")
    set_steps(page, 2)
    began = time.monotonic()
    generate(page)
    assert time.monotonic() - began < 20


def test_a_full_queue_is_said(browser, server, page) -> None:
    others = [browser.new_page() for _ in range(2)]
    for other in (*others, page):
        if other is not page:
            opened(other, server)
        choose_model(other, "zoo:emoji-unet")
        set_steps(other, 100)
    first, second = others
    first.locator("#generate").click()
    wait_for_step(first)
    second.locator("#generate").click()
    second.wait_for_timeout(1000)
    page.locator("#generate").click()
    page.get_by_text(re.compile("currently busy|queue is full", re.IGNORECASE)).first.wait_for()
    for other in others:
        other.close()


def test_recipes_go_out_and_come_back(page, tmp_path) -> None:
    page.get_by_text("Choose a method").click()
    page.locator("#method input").click()
    page.get_by_role("option", name="PlainCycle", exact=True).click()
    page.get_by_text("Recipe: what the next run uses").click()
    box = page.get_by_label("PlainCycle · interval")
    box.fill("4")
    box.press("Tab")
    page.wait_for_function("() => document.querySelector('#recipe').innerText.includes('interval')")
    shown = recipe_text(page)
    written = json.loads(shown)
    assert written["entries"] == [{"name": "PlainCycle", "settings": {"interval": 4}}]
    page.wait_for_timeout(1000)
    picture_of(page, "demo-method", full_page=True)
    with page.expect_download() as download:
        page.locator("#save").click()
    saved = tmp_path / "accel_recipe.json"
    download.value.save_as(saved)
    assert json.loads(saved.read_text()) == written

    page.reload()
    page.get_by_text("Ready.").wait_for()
    page.get_by_text("Recipe: what the next run uses").click()
    assert recipe_text(page) != shown  # a long text is in the page in part only
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(saved)
    page.wait_for_function(
        "() => document.querySelector('#recipe').innerText.includes('PlainCycle')"
    )
    assert json.loads(recipe_text(page)) == written
    set_steps(page, 8)
    generate(page)
    cells = page.locator("#heat svg title")
    computed = sum("computed" in cells.nth(i).text_content() for i in range(cells.count()))
    assert computed == 2 * 2


def test_a_stream_is_seen_reworded_and_stopped(page) -> None:
    page.get_by_role("tab", name="Stream").click()
    words = page.locator("#stream-prompt textarea")
    words.fill("apple on a blue background")
    page.locator("#stream-go").click()
    page.get_by_text("Streaming: frame").wait_for()
    page.wait_for_function(
        "() => /frame ([3-9]\\d|\\d{3})/.test(document.querySelector('#stream-status').innerText)"
    )
    frames = page.locator("#stream-out img")
    frames.wait_for()
    before = frames.get_attribute("src")
    page.wait_for_function(
        "before => document.querySelector('#stream-out img').src != before", arg=before
    )
    figures = page.locator("#stream-figures").inner_text()
    assert float(re.search(r"frames a second\s+([\d.]+)", figures)[1]) > 0
    assert re.search(r"left out\s+\d+%", figures)
    words.fill("frog on a green background")
    page.locator("#stream-change").click()
    page.wait_for_timeout(1500)
    picture_of(page, "demo-stream", full_page=True)
    page.locator("#stream-stop").click()
    page.get_by_text("Stopped the stream.").wait_for()
    page.wait_for_timeout(1000)
    stopped = frames.get_attribute("src")
    page.wait_for_timeout(1500)
    assert frames.get_attribute("src") == stopped


def test_uploaded_pictures_are_redrawn_to_the_end(page, tmp_path) -> None:
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (80, 60), (50 * number, 90, 160)).save(files[-1])
    page.get_by_role("tab", name="Stream").click()
    page.locator("#stream-files input[type=file]").set_input_files(files)
    page.wait_for_function(
        "() => document.querySelector('#stream-files').innerText.split('.png').length == 6"
    )
    page.locator("#stream-go").click()
    page.get_by_text("Ended after 5 frames.").wait_for()
    page.get_by_role("tab", name="Generate").click()
    choose_model(page, "zoo:emoji-unet")
    set_steps(page, 2)
    generate(page)  # nothing of the stream is left running


def test_closing_the_tab_ends_its_stream(browser, server, page) -> None:
    leaving = browser.new_page()
    opened(leaving, server)
    leaving.get_by_role("tab", name="Stream").click()
    leaving.locator("#stream-go").click()
    leaving.get_by_text("Streaming: frame").wait_for()
    leaving.close()
    choose_model(page, "zoo:emoji-unet")
    set_steps(page, 2)
    began = time.monotonic()
    generate(page)  # the camera alone would go on for minutes
    assert time.monotonic() - began < 20
