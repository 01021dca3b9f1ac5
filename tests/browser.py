"""A real browser for pages that stand alone: Debian's Chromium, driven by Playwright."""

import contextlib
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
PATIENCE = 300  # seconds for whatever is asked of a page or a server on two busy cores; Playwright's own 30 are few
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def launched(playwright):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium, as .ci/run does")
    return playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=1000 * PATIENCE)


def until(condition, page):
    """Wait for what the page has yet to tell this process."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        page.wait_for_timeout(50)
    assert condition()


@contextlib.contextmanager
def opened(path, width=1280, height=900):
    """The page of an HTML file, with .requests (all but the file itself) and .errors (of console and scripts)."""
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * PATIENCE)
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(Path(path).as_uri())
        page.wait_for_load_state("networkidle")
        yield page
        browser.close()


def widest(page):
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
