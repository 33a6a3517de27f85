# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser, headless: it draws, plays, turns, and obeys the keyboard, also on a phone."""

from __future__ import annotations

import shutil
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from moeapps.cli import main
from tests.reporting.made_runs import layer, tone, write, write_run, write_scan

pytestmark = pytest.mark.slow
NEEDED = (
    "a browser and its driver are missing: on Debian install the packages chromium and chromium-driver "
    "(apt-get install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of three systems: with scans, with clips, and two runs of one without a gallery."""
    folder = tmp_path_factory.mktemp("page")
    many = {"net.blocks.0.ffn": layer([[25.0] * 40] * 4, 0.0)}  # a table wider than a phone
    scans = write_run(folder / "scans", system="point_moe", task="tasks.point_cloud.module.PointCloudTask", layers=many)
    write_scan(scans / "gallery" / "north.npz")
    clips = write_run(folder / "clips", system="unimoe_audio", task="tasks.audio.module.AudioTask")
    tone(clips / "samples" / "test" / "north-0.wav", 0.4)
    write(clips / "samples" / "test" / "north-0.txt", "speech: ba")
    pair = [write_run(folder / f"pair_{seed}", seed=seed) for seed in (0, 1)]
    runs = [str(run) for run in (scans, clips, *pair)]
    assert main(["report", *runs, "-o", str(folder / "report.html")]) == 0
    return (folder / "report.html").as_uri()


def browser_of(width, height, *words):
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail(NEEDED)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--mute-audio", *words):
        options.add_argument(word)
    options.add_argument(f"--window-size={width},{height}")
    options.add_argument("--autoplay-policy=no-user-gesture-required")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


@pytest.fixture(scope="module")
def browser(address):
    made = browser_of(1280, 900)
    made.get(address)
    yield made
    made.quit()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    browser.refresh()
    return browser


def press(browser, selector):
    """Click an element once it stands still in the middle of the window: drawings above it take their room late."""
    element = find(browser, selector)
    place = "const box = arguments[0].getBoundingClientRect(); return box.top + box.height / 2"
    middle = "arguments[0].scrollIntoView({block: 'center'})"

    def still():
        browser.execute_script(middle, element)
        before = browser.execute_script(place, element)
        time.sleep(0.3)
        return browser.execute_script(place, element) == before

    until(browser, still)
    element.click()


def until(browser, condition, seconds=60):
    return WebDriverWait(browser, seconds).until(lambda _: condition())


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def shown(browser, selector):
    return [one for one in browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]


def complaints(browser):
    """What the console holds that is an error; what a driver without graphics hardware says of itself is none."""
    return [
        one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE" and "GPU" not in one["message"]
    ]


def test_every_tab_shows_its_drawings_and_the_console_stays_silent(page):
    assert [one.text for one in shown(page, "main > section > .tiles h3")] == [
        "Point-MoE point_moe",
        "UniMoE-Audio unimoe_audio",
        "toy",
    ]
    for number in range(3):
        press(page, f"#tab-system-{number}")
        until(page, lambda: shown(page, ".plot .main-svg, .plot canvas"))
        assert len(shown(page, "main > section")) == 1
        assert shown(page, ".matrix data")
    assert complaints(page) == []


def test_no_request_leaves_the_page(page):
    sent = [one["message"] for one in page.get_log("performance") if "Network.requestWillBeSent" in one["message"]]
    assert all('"url":"http' not in message for message in sent)


def test_runs_of_a_system_have_tabs_of_their_own(page):
    press(page, "#tab-system-2")
    assert [one.text for one in shown(page, ".runs [role=tab]")] == ["base, seed 0", "base, seed 1"]
    assert find(page, "#run-2").is_displayed()
    press(page, "#tab-run-3")
    assert find(page, "#run-3").is_displayed()
    assert not find(page, "#run-2").is_displayed()


def test_the_keyboard_reaches_tabs_and_moves_between_them(page):
    body = find(page, "body")
    body.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("class") == "skip"
    first = find(page, "#tab-overview")
    page.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("id") == "tab-system-0"
    assert find(page, "#system-0").is_displayed()
    page.switch_to.active_element.send_keys(Keys.END)
    assert page.switch_to.active_element.get_attribute("id") == "tab-system-2"
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("id") == "tab-overview"


def test_a_card_leads_to_its_system(page):
    press(page, '[data-opens="tab-system-1"]')
    assert find(page, "#system-1").is_displayed()
    assert page.switch_to.active_element.get_attribute("id") == "tab-system-1"


def test_a_clip_plays(page):
    press(page, "#tab-system-1")
    player = find(page, "audio")
    page.execute_script("arguments[0].play()", player)
    until(page, lambda: page.execute_script("return arguments[0].currentTime > 0", player))
    assert page.execute_script("return arguments[0].duration", player) == pytest.approx(0.4, abs=0.05)


def test_points_are_turned_and_coloured_anew(page):
    press(page, "#tab-system-0")
    cloud = find(page, ".cloud .plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", cloud)
    until(
        page,
        lambda: page.execute_script("return Boolean(arguments[0]._fullLayout?.scene?._scene)", cloud),
    )
    names = "return arguments[0].data.map((one) => one.name)"
    assert page.execute_script(names, cloud) == ["wall", "floor", "&lt;b&gt;chair&lt;/b&gt;"]
    points = "return arguments[0].data.reduce((sum, one) => sum + one.x.length, 0)"
    assert page.execute_script(points, cloud) == 300
    press(page, '.cloud [data-colouring="2"]')
    until(page, lambda: page.execute_script(names, cloud) == [f"expert {e}" for e in range(4)])
    assert find(page, '.cloud [data-colouring="2"]').get_attribute("aria-pressed") == "true"
    eye = "return arguments[0]._fullLayout.scene.camera.eye"
    before = page.execute_script(eye, cloud)
    cloud.send_keys(Keys.ARROW_LEFT)
    until(page, lambda: page.execute_script(eye, cloud)["x"] != before["x"])
    after = page.execute_script(eye, cloud)
    # A turn about the vertical keeps the height and the distance.
    assert after["z"] == before["z"]
    assert after["x"] ** 2 + after["y"] ** 2 == pytest.approx(before["x"] ** 2 + before["y"] ** 2)


def test_light_and_dark(page):
    ink = "return getComputedStyle(document.body).color"
    before, button = page.execute_script(ink), find(page, "#theme")
    button.click()
    assert page.execute_script(ink) != before
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.execute_script(ink) == before


def test_a_dark_system_gets_dark_colours_from_the_start(address):
    browser = browser_of(1280, 900)
    try:
        colours = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", colours)
        browser.get(address)
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert all(int(part) < 60 for part in paper.removeprefix("rgb(").rstrip(")").split(","))
    finally:
        browser.quit()


def test_a_phone_scrolls_down_and_never_sideways(address):
    browser = browser_of(500, 844)
    try:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address)
        for name in ("overview", "system-0", "system-1", "system-2"):
            browser.execute_script("document.getElementById(arguments[0]).click()", f"tab-{name}")
            time.sleep(1.0)  # drawings take their width
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 390, name
        assert complaints(browser) == []
    finally:
        browser.quit()
