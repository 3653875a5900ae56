"""A picture of the service's page with a plan on it: `python -m benchmarks.page_picture OUT.png`; needs Chromium.

Serves the profile of two H100 that lies in `benchmarks/results`, plans a batch for them, and takes a screenshot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

from db.rows.archive import import_hardware
from db.store.engine import open_database

PROFILE = Path(__file__).parent / "results" / "h100x2-pcie-like.profile.json.gz"
PROMPTS = "65536, 32768, 16384, 8192, 4096"
_WAIT_MS = 60_000


def main(output: Path) -> None:
    """Take the picture."""
    with served() as (address, token):
        _take(f"{address}/#token={token}", output)


@contextmanager
def served() -> Iterator[tuple[str, str]]:
    """A service without workers over the profile -> its address and a token; ended with the block."""
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        url = f"sqlite:///{folder}/rows.db"
        with open_database(url) as database:
            import_hardware(database, PROFILE)
        words = [sys.executable, "-m", "service", "serve", "--port", "0", "--no-worker", "--db", url]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            found = (re.search(r"(http://\S+)/#token=(\S+)", line) for line in process.stderr)
            address = next(match for match in found if match)
            yield address[1], address[2]
        finally:
            process.terminate()
            process.wait(30)


def _take(address: str, output: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        page.set_default_timeout(_WAIT_MS)
        page.goto(address)
        page.locator("#model option").first.wait_for(state="attached")
        page.fill("#prompts", PROMPTS)
        page.click("#plan-button")
        page.locator(".timeline canvas").wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
