"""The page in a real browser, from disk: what a person does with it, by mouse and by keyboard."""

import os
import shutil
from pathlib import Path

import pytest

from dspy_fst.report.page import build_report
from tests.report.happenings import CHILD, LATE, SEED, digest, whole_run
from tests.report.test_page import HOSTILE
from tests.report.test_record import written

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
]
SHOTS = os.environ.get("DSPY_FST_SHOTS")
"""A folder to keep the screenshots in; they are thrown away without it."""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with api.sync_playwright() as playwright:
        executable = CHROMIUM or playwright.chromium.executable_path  # the system's, or playwright's own
        if not Path(executable).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The page of one run, and of two compared."""
    folder = tmp_path_factory.mktemp("report")
    one, other = written(folder / "one", hostile_run()), written(folder / "other", whole_run()[:6])
    return {"one": build_report([one], folder / "one.html"), "two": build_report([one, other], folder / "two.html")}


def hostile_run():
    """A whole run in which the metric's feedback would like to be a script."""
    events = whole_run()
    for event in events:
        for rollout in event.get("rollouts", []):
            rollout["feedback"] = HOSTILE
    return events


@pytest.fixture
def page(browser, files):
    """The page of one run, opened from disk; the console and the network must stay silent to the end."""
    page, told = opened(browser, files["one"])
    yield page
    page.close()
    assert told == []


def opened(browser, file, **settings):
    page = browser.new_page(**settings)
    page.set_default_timeout(20_000)
    told = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.on("request", lambda request: None if request.url == file.as_uri() else told.append(request.url))
    page.goto(file.as_uri())
    return page, told


def candidate(page, said):
    return page.locator(f"#run-1-{digest(said)}")


def test_a_click_on_a_candidate_shows_its_text_and_what_changed(page):
    box = candidate(page, LATE)
    assert not box.locator("ins").is_visible()
    box.locator("summary").first.click()
    box.locator("ins").wait_for()
    assert box.locator("ins").inner_text() == "Be brief."
    assert box.locator(".diff").inner_text() == "Solve it step by step. Be brief."
    box.get_by_role("link", name="candidate 1").click()
    candidate(page, CHILD).locator(".diff").wait_for()


def test_a_point_of_the_lineage_opens_its_candidate_again_and_again(page):
    for _ in range(2):  # the second time the address is the same as before
        page.get_by_role("link", name="candidate 3, score 0.750").click()
        candidate(page, LATE).locator("ins").wait_for()
        candidate(page, LATE).locator("summary").first.click()
        candidate(page, LATE).locator("ins").wait_for(state="hidden")


def test_the_lineage_is_reached_and_opened_by_keyboard(page):
    page.get_by_role("link", name="candidate 1, score 0.500").focus()
    page.keyboard.press("Enter")
    candidate(page, CHILD).locator("summary:focus").wait_for()
    candidate(page, CHILD).locator(".diff").wait_for()
    page.keyboard.press("Enter")
    candidate(page, CHILD).locator(".diff").wait_for(state="hidden")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.locator("details[open] > summary:focus").wait_for()


def test_an_address_with_a_candidate_opens_it(browser, files):
    page, _ = opened(browser, files["one"])
    page.goto(f"{files['one'].as_uri()}#run-1-{digest(SEED)}")
    candidate(page, SEED).locator(".said").wait_for()
    page.close()


def test_one_step_s_trajectories_are_shown_at_a_time(page):
    steps = page.locator(".step")
    assert [steps.nth(i).is_visible() for i in range(4)] == [False, False, False, True]
    page.get_by_label("Update", exact=True).select_option("2")
    assert [steps.nth(i).is_visible() for i in range(4)] == [False, False, True, False]
    assert "masked: timeout" in page.locator(".step:visible").inner_text()
    page.get_by_label("Update", exact=True).focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".step:visible h3").inner_text() == "Update 1"
    assert "onerror=alert(2)" in page.locator(".step:visible").inner_text()


def test_the_numbers_of_a_chart_are_a_table(page):
    chart = page.locator("#chart-reward-by-rollouts")
    chart.locator("summary").click()
    rows = chart.locator("tbody tr")
    assert [rows.nth(i).inner_text().split() for i in range(rows.count())] == [
        ["52", "0.25"],
        ["84", "0.5"],
        ["168", "0.75"],
    ]


def test_without_javascript_everything_can_be_read(browser, files):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(files["one"].as_uri())
    assert page.locator(".step:visible").count() == 4
    assert not page.get_by_label("Update", exact=True).is_visible()
    candidate(page, LATE).locator("summary").first.click()
    assert candidate(page, LATE).locator("ins").is_visible()
    page.context.close()


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen(browser, files, tmp_path, which, scheme, width):
    page, told = opened(browser, files[which], viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.querySelector('#chart-entropy svg text')).fill")
    assert (ground, text) == {
        "light": ("rgb(245, 246, 248)", "rgb(29, 33, 39)"),
        "dark": ("rgb(18, 21, 26)", "rgb(231, 234, 238)"),
    }[scheme]
    shot = Path(SHOTS or tmp_path) / f"{which}-{width}-{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 10_000
    page.close()
    assert told == []


def test_on_paper_every_candidate_is_open_and_the_controls_are_gone(browser, files, tmp_path):
    page, told = opened(browser, files["one"])
    page.emulate_media(media="print")
    assert page.locator(".candidate ins").last.is_visible()
    assert not page.get_by_role("navigation").is_visible()
    assert page.locator(".numbers:visible").count() == 0
    paper = Path(SHOTS or tmp_path) / "one.pdf"
    page.pdf(path=paper, format="A4", print_background=True)
    assert paper.stat().st_size > 10_000
    page.close()
    assert told == []
