"""The page in a real browser: typed, dragged and clicked at, as a person would.

Needs gradio (the extra "app"), playwright and a chromium of the system (Debian: `apt-get install
--no-install-recommends chromium`); where one of them is missing the tests are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hookctl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]

pytestmark = [
    pytest.mark.slow,  # a pipeline draws for real, and a browser starts: a minute in all
    pytest.mark.skipif(bool(MISSING), reason=f"the page can't be tried here without {MISSING}"),
]

PATIENCE = 300_000  # ms: machines that test are busy
# Keeps the screenshots of a run for docs/, if it names a folder.
SHOTS = os.environ.get("HOOKCTL_SHOTS")
STEPS = 25 if SHOTS else 8


@pytest.fixture(scope="module")
def desk() -> Any:
    from hookctl.app.person import desk_of

    return desk_of(hookctl.load_shapes(device="cpu"), "shapes")


@pytest.fixture(scope="module")
def address(desk: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    from hookctl.app.page import build, launched

    page = build(desk)
    try:
        yield launched(page)
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page as a person of their own; what went wrong in it fails the test."""
    pages: list[Any] = []
    wrong: list[str] = []

    def open_page(width: int = 1280, height: int = 1000, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: _note_elsewhere(asked.url, wrong))
        page.goto(address)
        page.wait_for_selector("#card-1")
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert not wrong, wrong


def _note_elsewhere(url: str, wrong: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
        wrong.append(f"asked {url}")


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.mouse.move(2, 2)
        page.wait_for_timeout(700)
        page.screenshot(path=Path(SHOTS, f"{name}.png"), full_page=True)


def set_number(page: Any, where: str, value: Any) -> None:
    page.locator(f"{where} input:not([type=range])").first.fill(str(value))
    page.keyboard.press("Tab")


def choose(page: Any, where: str, text: str) -> None:
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=text).first.click()


def draw(page: Any) -> None:
    """Press the button, and wait for how it ends."""
    page.evaluate("document.querySelector('#status p')?.setAttribute('data-before', '')")
    page.click("#run")
    page.wait_for_function(
        "() => !document.querySelector('#run').disabled"
        " && !document.querySelector('#status .bar')"
        " && document.querySelector('#status p:not([data-before])')"
    )


def status(page: Any) -> str:
    return str(page.inner_text("#status"))


def picture(page: Any, where: str) -> Image.Image:
    """The picture that the page shows, as it was made."""
    page.wait_for_selector(f"{where} img")
    data = page.request.get(page.get_attribute(f"{where} img", "src")).body()
    return Image.open(BytesIO(data)).convert("RGB")


def test_type_draw_and_look(opened: Callable[..., Any], desk: Any) -> None:
    """The first picture, its maps, what a place looks at, the report and the copies."""
    from hookctl.demos.shapes.detect import detect, matches

    page = opened()
    shot(page, "first")
    page.fill("#prompt textarea", "a red circle above a blue square on a white background")
    page.fill("#edit textarea", "a green circle above a blue square on a white background")
    set_number(page, "#steps", STEPS)
    draw(page)
    assert "Done" in status(page)
    source, edited = picture(page, "#source"), picture(page, "#edited")
    assert matches(detect(source), "a red circle above a blue square"), detect(source)
    assert matches(detect(edited), "a green circle above a blue square"), detect(edited)

    page.get_by_role("tab", name="Where words act").click()
    words = page.locator("#word label")
    page.wait_for_selector("#map img")  # of the word that the edit brought
    assert page.locator("#word label.selected").inner_text() == "green"
    assert "green" in words.all_inner_texts() and words.count() == 9  # "a" and "on" count once
    page.locator("#word label", has_text="square").click()
    page.wait_for_timeout(1000)
    page.locator("#map img").click(position={"x": 150, "y": 220})
    page.wait_for_selector("#looks .bars")
    assert page.locator("#looks .bars tr").count() == 9
    assert picture(page, "#seen").size == picture(page, "#map").size == (512, 512)
    shot(page, "maps")
    set_number(page, "#step", 3)
    page.wait_for_timeout(1000)

    page.get_by_role("tab", name="What was done").click()
    page.wait_for_selector("#report .report td")
    assert "PromptToPrompt" in page.inner_text("#report")
    page.get_by_role("tab", name="Take it along").click()
    page.wait_for_selector("#copy-toml .cm-content")
    assert 'recipe = "PromptToPrompt"' in page.inner_text("#copy-toml")
    shot(page, "copies")


def test_places_say_what_is_where(opened: Callable[..., Any]) -> None:
    """A box drawn by dragging and a mask that is painted, each with a text, and a card of them."""
    from hookctl.demos.shapes.detect import detect

    page = opened()
    page.click("#card-1-remove")
    page.wait_for_selector("#card-1", state="detached")
    page.fill("#prompt textarea", "a red circle and a blue square on a white background")
    page.fill("#edit textarea", "")
    set_number(page, "#steps", STEPS)
    set_number(page, "#guidance", 3)
    choose(page, "#kind", "RegionalPrompts")
    page.wait_for_selector("#card-1 .note")
    assert "there is no box yet" in page.inner_text("#card-1 .note")

    drag(page, (2, 4), (48, 96))
    page.locator("#canvas .list input").nth(0).fill("a red circle on a white background")
    page.get_by_role("button", name="Brush").click()
    page.locator("#canvas .width").fill("30")
    drag(page, (68, 8), (68, 92))
    drag(page, (90, 8), (90, 92))  # the same place is painted on
    drag(page, (68, 50), (90, 50))
    assert page.locator("#canvas .list li").count() == 2
    page.get_by_role("button", name="Eraser").click()
    drag(page, (99, 0), (99, 0))
    page.locator("#canvas .list input").nth(1).fill("a blue square on a white background")
    page.keyboard.press("Tab")
    page.wait_for_selector("#card-1 .note", state="detached")
    set_number(page, "#card-1-base", 0.4)
    set_number(page, "#card-1-stop", 0.5)
    page.wait_for_timeout(1000)
    draw(page)
    assert "Done" in status(page), status(page)
    shot(page, "places")
    found = detect(picture(page, "#edited"))
    circle, square = found.find("circle"), found.find("square")
    assert circle is not None and square is not None, found
    assert circle.centre[0] < 64 < square.centre[0]
    page.get_by_role("tab", name="Where words act").click()
    page.wait_for_selector("#map img")
    hues = page.inner_text("#hues style")  # of "red" and "circle", then of "blue" and "square"
    assert hues.count("#E69F00") == 2 == hues.count("#56B4E9")
    page.get_by_role("tab", name="Take it along").click()
    page.wait_for_selector("#copy-toml .cm-content")
    copied = page.inner_text("#copy-toml")
    assert {"base = 0.4", "stop = 0.5"} < {*copied.split("\n")}
    assert '"box:0.02,0.04,0.48,0.96", "mask:data:image/png;base64,' in copied.replace("\n", "")


def test_what_is_typed_is_kept(opened: Callable[..., Any]) -> None:
    """Whatever is clicked next, and if cards are drawn anew while somebody types."""
    page = opened()
    choose(page, "#kind", "PAG")
    page.wait_for_selector("#card-2 .name:text-is('PAG')")
    page.click("#card-2 summary")
    sites, scale = page.locator("#card-2-sites textarea"), page.locator("#card-2-scale-input")
    page.fill("#prompt textarea", "a yellow star above a blue square")
    sites.click()  # the prompt is left, so that cards are drawn anew: they offer its words
    page.keyboard.type("self mid", delay=40)
    page.wait_for_selector("#card-1-blend label:has-text('yellow')")
    page.keyboard.type(", self up0", delay=40)
    assert sites.input_value() == "self mid, self up0"
    page.locator("#card-2-scale input[type=range]").fill("5.5")
    assert scale.input_value() == "5.5"
    page.locator("#card-1-blend input[value=star]").check()
    page.click("#card-2-up")
    page.wait_for_selector("#card-1 .name:text-is('PAG')")
    assert page.input_value("#card-1-sites textarea") == "self mid, self up0"
    page.fill("#edit textarea", "a red star above a blue square")
    set_number(page, "#steps", 2)
    page.locator("#card-1-stop-input").fill("0.5")
    draw(page)  # at once
    assert "Done" in status(page), status(page)
    page.get_by_role("tab", name="Take it along").click()
    page.wait_for_selector("#copy-toml .cm-content")
    copied = page.inner_text("#copy-toml").split("\n")
    assert {'sites = "self mid, self up0"', "scale = 5.5", "stop = 0.5"} < {*copied}
    assert 'blend = [["circle", "star"], ["circle", "star"]]' not in copied  # no circle any more
    assert 'blend = [["star"], ["star"]]' in copied


def drag(page: Any, *places: tuple[int, int]) -> None:
    """Over the canvas, in hundredths of its sides."""
    page.locator("#canvas svg").scroll_into_view_if_needed()
    frame = page.locator("#canvas svg").bounding_box()
    at = [(frame["x"] + frame["width"] * x / 100, frame["y"] + frame["height"] * y / 100)
          for x, y in places]  # fmt: skip
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()


def test_a_trained_module_is_a_card(opened: Callable[..., Any]) -> None:
    """An example of learned weights that come along, its things moved to other places."""
    from hookctl.demos.shapes.detect import detect

    page = opened()
    choose(page, "#example", "Objects at their places by a trained module")
    page.wait_for_selector("#card-1 .name:text-is('Grounding')")
    page.wait_for_function("() => document.querySelectorAll('#canvas .list li').length == 2")
    set_number(page, "#steps", 12)
    drag(page, (25, 25), (75, 25))  # the circle's box, from the left to the right
    page.wait_for_timeout(1000)
    draw(page)
    assert "Done" in status(page), status(page)
    found = detect(picture(page, "#edited"))
    circle, square = found.find("circle", "red"), found.find("square", "blue")
    assert circle is not None and square is not None, found
    assert circle.centre == pytest.approx((0.75 * 128, 0.25 * 128), abs=12)
    assert square.centre == pytest.approx((0.75 * 128, 0.75 * 128), abs=12)
    shot(page, "trained")


def test_mistakes_are_said_and_the_page_lives_on(opened: Callable[..., Any]) -> None:
    page = opened()
    page.fill("#edit textarea", "")
    draw(page)
    assert "Compares two prompts" in status(page) and "Traceback" not in status(page)
    page.wait_for_selector("#card-1 .note")
    choose(page, "#kind", "MasaCtrl")
    page.fill("#edit textarea", "a green circle above a blue square")
    page.wait_for_selector("#card-2")
    page.click("#card-2-up")  # to be looked over again
    page.wait_for_selector("#card-1 .name:has-text('MasaCtrl')")  # drawn anew
    page.wait_for_function("() => document.querySelectorAll('.card .note').length == 2")
    assert "both claim the substitution" in page.inner_text("#card-1 .note")
    assert page.locator("#card-2-blend input:checked").count() == 1  # it came along
    shot(page, "conflict")
    page.click("#card-1-switch")
    page.wait_for_selector("#card-1.off")
    set_number(page, "#steps", 2)
    draw(page)
    assert "Done" in status(page), status(page)


def test_two_people_and_a_stop(opened: Callable[..., Any], desk: Any) -> None:
    """The second waits for the first, who stops; each keeps their own."""
    one, two = opened(), opened()
    one.fill("#prompt textarea", "a yellow star")
    one.fill("#edit textarea", "a red star")
    set_number(one, "#steps", 100)
    set_number(two, "#steps", 2)
    one.click("#run")
    one.wait_for_function("() => document.querySelector('#status').innerText.includes('step ')")
    two.click("#run")
    two.wait_for_function("() => document.querySelector('#status').innerText.includes('yours is')")
    shot(one, "drawing")
    one.click("#stop")
    one.wait_for_function("() => document.querySelector('#status').innerText.includes('Stopped')")
    two.wait_for_function("() => document.querySelector('#status').innerText.includes('Done')")
    assert two.input_value("#prompt textarea") == "a red circle above a blue square"
    assert one.locator("#edited img").count() == 0 and two.locator("#edited img").count() == 1
    assert not desk.lock.locked()


def test_a_closed_tab_ends_its_run(opened: Callable[..., Any], desk: Any) -> None:
    page = opened()
    set_number(page, "#steps", 100)
    page.click("#run")
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('step 1')")
    page.context.close()
    for _ in range(600):
        if not desk.lock.locked():
            break
        desk.lock.acquire(timeout=0.1) and desk.lock.release()
    assert not desk.lock.locked()


def test_a_narrow_screen_in_the_dark(opened: Callable[..., Any], desk: Any) -> None:
    page = opened(390, 844, color_scheme="dark", has_touch=True)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    shot(page, "narrow")


def test_a_program_draws_after_a_picture(opened: Callable[..., Any], tmp_path: Path) -> None:
    """A scene round a picture of one's own, which stays where it is put."""
    from hookctl.demos.shapes.detect import detect
    from hookctl.demos.shapes.render import drawn
    from hookctl.demos.shapes.world import Scene, Thing

    file, scene = tmp_path / "own.png", Scene((Thing("circle", "red", centre=(64, 64)),))
    drawn([scene])[0].save(file)
    page = opened()
    page.click("#card-1-remove")
    page.wait_for_selector("#card-1", state="detached")
    page.fill("#edit textarea", "")
    choose(page, "#kind", "CyclicOneWay")
    page.wait_for_selector("#card-1 .note")
    assert "Takes a picture" in page.inner_text("#card-1 .note")
    page.get_by_role("button", name="Your own picture").click()
    page.locator("#upload input[type=file]").set_input_files(str(file))
    page.wait_for_selector("#upload img")
    page.wait_for_selector("#card-1 .note", state="detached")
    set_number(page, "#steps", 20)
    set_number(page, "#guidance", 3)
    page.click("#card-1 summary")
    set_number(page, "#card-1-cycles", 2)
    for name, value in (("at", "[32, 0]"), ("image_size", "[64, 64]")):
        page.fill(f"#card-1-{name} textarea", value)
    for name, value in (("finish", 0.05), ("final_eta", 0)):
        set_number(page, f"#card-1-{name}", value)
    draw(page)
    assert "Done" in status(page), status(page)
    circle = detect(picture(page, "#edited")).find("circle", "red")
    assert circle is not None and circle.centre == pytest.approx((64, 32), abs=4)
    page.get_by_role("tab", name="Take it along").click()
    page.wait_for_selector("#copy-toml .cm-content")
    assert "[program]" in page.inner_text("#copy-toml")
    shot(page, "program")


def test_own_picture(opened: Callable[..., Any], tmp_path: Path) -> None:
    """Uploaded, brought to the model's size, inverted, and edited."""
    from hookctl.demos.shapes.detect import detect, matches
    from hookctl.demos.shapes.render import drawn
    from hookctl.demos.shapes.world import Scene, Thing

    things = Thing("circle", "red", centre=(64, 36)), Thing("square", "blue", centre=(64, 92))
    file = tmp_path / "own.png"
    drawn([Scene(things)])[0].resize((256, 256)).save(file)
    page = opened()
    page.get_by_text("Your own picture").click()
    page.locator("#upload input[type=file]").set_input_files(str(file))
    page.wait_for_selector("#upload img")
    set_number(page, "#steps", 25)
    set_number(page, "#guidance", 3)
    draw(page)
    assert "Done" in status(page), status(page)
    found = detect(picture(page, "#edited"))
    assert matches(found, "a green circle above a blue square") and not found.extras, found
    assert len(found.objects) == 2 and found.background == "white", found
    square = found.find("square")
    assert square is not None and square.centre == pytest.approx((64, 92), abs=2)  # as it was
    shot(page, "own")
