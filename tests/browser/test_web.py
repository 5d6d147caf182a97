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

SETTLE_MS = 1000  # what opens takes the page's values, and what is typed becomes one of them, a moment later
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


def open_tab(browser, name: str) -> None:
    browser.get_by_role("tab", name=name).click()
    browser.wait_for_timeout(SETTLE_MS)


def set_seed(browser, tab: str, seed: int) -> None:
    browser.get_by_text("Sampling").locator("visible=true").click()
    browser.wait_for_timeout(SETTLE_MS)
    browser.fill(f"#{tab}-seed input", str(seed))
    browser.wait_for_timeout(SETTLE_MS)


def images_in(browser, place: str) -> list[Image.Image]:
    sources = [image.get_attribute("src") for image in browser.locator(f"{place} img").all()]
    return [Image.open(io.BytesIO(urllib.request.urlopen(source).read())) for source in sources]


@pytest.fixture
def picture(tmp_path):
    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 20)
    picture.save(tmp_path / "picture.png")
    return picture


def test_it_listens_on_this_machine_alone(address):
    assert re.match(r"http://127\.0\.0\.1:\d+/", address)


def test_drawing(browser, model):
    open_tab(browser, "Draw")
    browser.fill("#prompt textarea", "two cats")
    set_seed(browser, "draw", 5)
    browser.get_by_role("spinbutton", name=re.compile("Images")).locator("visible=true").fill("2")
    browser.wait_for_timeout(SETTLE_MS)
    browser.click("#draw")
    browser.wait_for_selector("#drawings img")
    assert browser.get_by_text("seed 6").is_visible()
    shown = images_in(browser, "#drawings")
    expected = model.draw("two cats", n=2, seed=5)
    assert [image.convert("RGB").tobytes() for image in shown] == [image.tobytes() for image in expected]
    assert shown[0].size == (IMAGE_SIZE, IMAGE_SIZE)


def test_describing(browser, model, picture, tmp_path):
    open_tab(browser, "Describe")
    browser.click("#describe")
    browser.get_by_text("choose an image first").wait_for()
    browser.set_input_files("#shown input[type=file]", tmp_path / "picture.png")
    browser.wait_for_selector("#shown img")
    browser.fill("#beginning textarea", "a")
    browser.click("#describe")
    browser.wait_for_function("document.querySelector('#description textarea').value != ''")
    (text,) = model.describe([picture], "a", max_new_tokens=web.MAX_NEW_TOKENS)
    assert browser.input_value("#description textarea") == ("a" + text).strip()
    (answer,) = model.ask([picture], "two cats?", max_new_tokens=web.MAX_NEW_TOKENS)
    assert answer.strip() != ("a" + text).strip()
    browser.fill("#question textarea", "two cats?")
    browser.click("#describe")
    browser.wait_for_function(
        "answer => document.querySelector('#description textarea').value == answer", arg=answer.strip()
    )


def test_editing(browser, model, picture, tmp_path):
    open_tab(browser, "Edit")
    browser.set_input_files("#source input[type=file]", tmp_path / "picture.png")
    browser.wait_for_selector("#source img")
    browser.fill("#instruction textarea", "a tree")
    set_seed(browser, "edit", 5)
    browser.click("#edit")
    browser.wait_for_selector("#edits img")
    (expected,) = model.edit(picture, "a tree", seed=5)
    assert [image.convert("RGB").tobytes() for image in images_in(browser, "#edits")] == [expected.tobytes()]


def letters(text: str) -> str:
    """What a page shows alike: random weights write control characters, too."""
    return "".join(filter(str.isalnum, text))


def test_a_conversation_is_shown_and_goes_on(browser, model, picture, tmp_path):
    open_tab(browser, "Chat")
    set_seed(browser, "chat", 5)
    browser.set_input_files("#said input[type=file]", tmp_path / "picture.png")
    browser.wait_for_selector("#said img")
    messages = []
    for turn, content in enumerate(([picture, "two cats?"], ["and?"])):
        messages.append({"role": "user", "content": content})
        answer = model.interleave(messages, seed=5)
        messages.append({"role": "assistant", "content": answer})
        browser.fill("#said textarea", content[-1])
        browser.press("#said textarea", "Enter")
        said = [part for part in answer if isinstance(part, str) and part.strip()]
        drawn = sum(not isinstance(part, str) for message in messages for part in message["content"])
        browser.wait_for_function(
            "([count, turns]) => document.querySelectorAll('#history img').length == count"
            " && document.querySelectorAll('#history .user').length >= turns",
            arg=[drawn, turn + 1],
        )
        history = letters(browser.inner_text("#history"))
        assert letters(content[-1]) in history and all(letters(part) in history for part in said)
    expected = [part for message in messages[1:] for part in message["content"] if not isinstance(part, str)]
    found = [image.convert("RGB").tobytes() for image in images_in(browser, "#history")]
    assert found[1:] == [image.convert("RGB").tobytes() for image in expected]
    browser.click("#again")
    browser.wait_for_function("document.querySelectorAll('#history img').length == 0")
