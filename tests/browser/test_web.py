"""The page in a real browser: drawing and describing are clicked, and what is shown is what the model gives."""

import io
import re
import urllib.request

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from megadual import web
from megadual.hf.folder import open_folder
from megadual.testing.models import IMAGE_SIZE, write_export

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_folder(write_export(tmp_path_factory.mktemp("web")), "cpu")


@pytest.fixture(scope="module")
def address(model):
    blocks = web.page(model, "tiny")
    yield web.serve(blocks, "127.0.0.1", None, block=False)
    blocks.close(verbose=False)


@pytest.fixture
def browser(address, chromium):
    """The page, opened; afterwards nothing may have been asked of any other host."""
    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        browser.close()
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not outside


def test_it_listens_on_this_machine_alone(address):
    assert re.match(r"http://127\.0\.0\.1:\d+/", address)


def test_drawing(browser, model):
    browser.fill("#prompt textarea", "two cats")
    browser.get_by_text("Sampling").click()
    browser.fill("#seed input", "5")
    browser.get_by_role("spinbutton", name=re.compile("Images")).fill("2")
    browser.click("#draw")
    browser.wait_for_selector("#drawings img")
    sources = [image.get_attribute("src") for image in browser.locator("#drawings img").all()]
    shown = [Image.open(io.BytesIO(urllib.request.urlopen(source).read())) for source in sources]
    expected = model.draw("two cats", n=2, seed=5)
    assert [image.convert("RGB").tobytes() for image in shown] == [image.tobytes() for image in expected]
    assert browser.get_by_text("seed 6").is_visible() and shown[0].size == (IMAGE_SIZE, IMAGE_SIZE)


def test_describing(browser, model, tmp_path):
    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    picture.save(tmp_path / "picture.png")
    browser.get_by_role("tab", name="Describe").click()
    browser.click("#describe")
    browser.get_by_text("Choose an image first.").wait_for()
    browser.set_input_files("#shown input[type=file]", tmp_path / "picture.png")
    browser.wait_for_selector("#shown img")
    browser.fill("#beginning textarea", "a")
    browser.click("#describe")
    browser.wait_for_function("document.querySelector('#description textarea').value != ''")
    (text,) = model.describe([picture], "a", max_new_tokens=web.MAX_NEW_TOKENS)
    assert browser.input_value("#description textarea") == ("a" + text).strip()
