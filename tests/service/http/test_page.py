"""The page as a person uses it: a real service, a real worker, and Debian's Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from benchmarks.demo_model import SMALL, write_demo_model
from db.rows.measurements import save_measurements
from db.store.engine import open_database
from profiler.model import load_model_shape
from tests.service.test_tune import HARDWARE
from tests.structures import ROOT
from tests.tuner.measured import SHAPE, Machine, measure
from tuner.plan.plan import Plan

pytestmark = pytest.mark.timeout(280)
WAIT_MS = 60_000
TABS = ("plan", "hardware", "runs", "jobs")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that a service prints, token and all."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "models").mkdir()
    write_demo_model(folder / "models" / "demo", SMALL)
    demo = load_model_shape(str(folder / "models" / "demo"))
    url = f"sqlite:///{folder / 'rows.db'}"
    with open_database(url) as database:
        rows = [row for shape in (SHAPE, demo) for tp in (1, 2) for row in measure(Machine(), shape=shape, tp_size=tp)]
        save_measurements(database, HARDWARE, {row.key: row for row in rows}.values())
    words = [sys.executable, "-m", "service", "serve", "--port", "0", "--db", url, "--models", str(folder / "models")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*words, "--machine", folder.name], stderr=subprocess.PIPE, stdout=log, env=environment
        )
    try:
        assert process.stderr is not None
        printed = ""
        for line in process.stderr:
            printed += line.decode()
            found = re.search(r"Open (http://127\.0\.0\.1:\d+/#token=[\w-]+)", printed)
            if found:
                yield found[1]
                break
        else:
            pytest.fail(f"the service ended: {printed}")
    finally:
        process.terminate()
        assert process.wait(30) in (0, 143)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: apt-get install chromium")
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


class Watched:
    """A page with what went wrong on it."""

    def __init__(self, browser: Browser, *, width: int = 1440, scheme: Literal["light", "dark"] = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", self._asked)

    def _asked(self, request: Request) -> None:
        self.asked.append(request.url)

    def visit(self, address: str) -> Page:
        self.page.goto(address)
        expect(self.page.locator("#model option").first).to_be_attached(timeout=WAIT_MS)
        return self.page

    def check(self, address: str) -> None:
        """Nothing went wrong, and nothing was asked of anybody else."""
        assert self.said == []
        home = address.partition("#")[0]
        assert [url for url in self.asked if not url.startswith((home, "data:", "blob:"))] == []


def make_plan(page: Page) -> None:
    page.select_option("#model", "llama-3.2-1b")
    page.fill("#prompts", "6000, 700 300")
    page.click("#plan-button")
    expect(page.locator(".timeline canvas")).to_be_visible(timeout=WAIT_MS)


def test_a_first_visit_plans_asks_what_if_and_takes_the_plan_away(
    address: str, browser: Browser, tmp_path: Path
) -> None:
    watched = Watched(browser)
    page = watched.visit(address)
    assert "token" not in page.url
    make_plan(page)
    expect(page.locator("#results")).to_contain_text("above the best possible")
    expect(page.locator("#results")).to_contain_text("Layouts, the best first")
    before = page.locator(".figure b").first.inner_text()
    page.locator("#if-prompt").fill("2")
    expect(page.locator(".timeline")).to_contain_text("What if", timeout=WAIT_MS)
    assert page.locator(".figure b").first.inner_text() != before
    page.locator("#if-prompt").fill("0")
    expect(page.locator(".timeline")).to_contain_text("The pipeline over time", timeout=WAIT_MS)
    canvas = page.locator(".timeline canvas")
    whole = canvas.screenshot()
    canvas.focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert canvas.screenshot() != whole
    page.keyboard.press("0")
    canvas.hover(position={"x": 90, "y": 36})
    expect(page.locator("#tip")).to_contain_text("tokens after")
    page.select_option("[aria-label='Files for an engine']", "vllm")
    with page.expect_download() as download:
        page.click("text=Download the files for vllm")
    with zipfile.ZipFile(download.value.path()) as files:
        assert {Path(name).name for name in files.namelist()} == {"launch.sh", "plan.json"}
    with page.expect_download() as download:
        page.click("text=Download the plan")
    download.value.save_as(tmp_path / "plan.json")
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert [request.prompt_tokens for request in plan.requests] == [6000, 700, 300]
    watched.check(address)


def test_a_trace_is_dropped_in_and_what_is_wrong_is_told(address: str, browser: Browser, tmp_path: Path) -> None:
    watched = Watched(browser)
    page = watched.visit(address)
    page.select_option("#model", "llama-3.2-1b")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"input_length": 500, "timestamp": 100 * i}) + "\n" for i in range(5)))
    page.set_input_files("#trace", trace)
    expect(page.locator("#trace-summary")).to_contain_text("5 requests")
    page.click("#plan-button")
    expect(page.locator("#results")).to_contain_text("each seeing a request when it arrives", timeout=WAIT_MS)
    page.click("text=use the lengths above instead")
    watched.check(address)
    page.fill("#prompts", "many")
    page.click("#plan-button")
    expect(page.locator("#plan-error")).to_contain_text("must be a whole number", timeout=WAIT_MS)


def test_a_job_is_started_watched_and_cancelled(address: str, browser: Browser) -> None:
    watched = Watched(browser)
    page = watched.visit(address)
    page.click("nav >> text=Jobs")
    expect(page.locator("#job-worker option").first).to_be_attached(timeout=WAIT_MS)
    page.select_option("#job-model", "demo")
    page.fill("#job-budget", "300")
    page.click("#job-form button.primary")
    card = page.locator("[data-job]").first
    expect(card.locator(".tag")).to_have_text("running", timeout=WAIT_MS)
    expect(card.locator("pre")).to_contain_text("takes it up", timeout=WAIT_MS)
    expect(page.locator("#jobs-live")).to_have_text("1")
    card.locator("text=Cancel").click()
    expect(card.locator(".tag")).to_have_text("cancelled", timeout=WAIT_MS)
    expect(card.locator("text=Try again")).to_be_visible()
    watched.check(address)


def test_a_plan_is_taken_away_and_run(address: str, browser: Browser) -> None:
    watched = Watched(browser)
    page = watched.visit(address)
    page.select_option("#model", "demo")
    page.fill("#prompts", "900, 200")
    page.click("#plan-button")
    with page.expect_download() as download:
        page.click("text=Download the plan")
    plan = Plan.from_json(json.loads(download.value.path().read_text()))
    page.click("text=Run it")
    card = page.locator("[data-job]", has_text="run-plan").first
    expect(card.locator(".tag")).to_have_text("done", timeout=2 * WAIT_MS)
    page.click("nav >> text=Runs")
    page.locator("#runs-list button", has_text="run ").first.click()
    expect(page.locator("#run-detail")).to_contain_text("Measured", timeout=WAIT_MS)
    expect(page.locator("#run-detail canvas").first).to_have_attribute(
        "aria-label", re.compile(rf"{len(plan.rounds)} rounds on {plan.parallel.pp_size} stages")
    )
    watched.check(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_every_part_fits_and_can_be_read(address: str, browser: Browser, scheme: str, width: int) -> None:
    watched = Watched(browser, width=width, scheme=scheme)
    page = watched.visit(address)
    make_plan(page)
    for tab in TABS:
        page.click(f"nav >> text={tab.title()}")
        expect(page.locator(f"#{tab}")).to_be_visible()
        page.wait_for_load_state("networkidle") if tab != "jobs" else page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        found = Axe().run(page).response["violations"]
        printed = [f"{one['id']}: {[node['html'][:120] for node in one['nodes']]}" for one in found]
        assert printed == [], tab
    watched.check(address)


def test_the_page_is_small_and_says_nothing_to_strangers(address: str, browser: Browser) -> None:
    folder = ROOT / "service" / "http" / "static"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    watched = Watched(browser)
    page = watched.page
    page.goto(address.partition("#")[0])
    expect(page.locator("#login")).to_be_visible()
    watched.check(address)
    page.fill("#token", "wrong")
    page.click("text=Open >> nth=-1")
    expect(page.locator("#login-error")).to_contain_text("Bearer")
