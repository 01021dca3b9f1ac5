"""Pictures for README: the demo with two models on a desk and on a telephone in the dark, and a run's report.

    python benchmarks/screenshots.py runs/first runs/first/checkpoint-250 --output_dir docs
    python benchmarks/screenshots.py runs/first        # the report alone

Serves space/app.py and opens it in Debian's Chromium (`pip install -e '.[test]'`, `apt-get install chromium`). What the
models write is the first and only draw of the seed.
"""

import argparse
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

APP = Path(__file__).resolve().parents[1] / "space" / "app.py"
PROMPT = "The statement is used to"
SETTINGS = {"Max new tokens": "48", "Temperature": "0.7", "Top-p": "0.9"}
VIEWS = {"demo.png": (1100, 860, "light"), "demo-phone-dark.png": (390, 844, "dark")}


def wait_for(address, server):
    while server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=60).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the page was not served: status {server.returncode}")


def take(browser, address, path, width, height, scheme):
    """Ask both models for a continuation and photograph the page once they have ended."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(address)
    page.get_by_label("Beginning of a text").fill(PROMPT)
    settings = page.get_by_role("button", name="Settings")
    settings.click()
    for label, value in SETTINGS.items():
        box = page.get_by_label(f"number input for {label}")
        box.fill(value)
        box.press("Tab")
    if width < 600:
        settings.click()
    page.get_by_role("button", name="Continue").click()
    for written in page.get_by_role("region").all():
        written.get_by_text("ended: ").wait_for(timeout=120_000)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=path, full_page=True)
    page.close()


def take_demo(browser, args):
    """Serve the demo of both models and photograph each view."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--model", args.model, "--compare", args.compare, "--port", port]
    server = subprocess.Popen([sys.executable, str(APP), *words], stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address, server)
        for name, view in VIEWS.items():
            take(browser, address, args.output_dir / name, *view)
    finally:
        server.terminate()
        server.wait()


def take_report(browser, run, path):
    """Photograph the top of report.html: what was reached, and the curves."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(Path(run, "report", "report.html").resolve().as_uri())
    page.screenshot(path=path)
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("compare", nargs="?")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
        if Path(args.model, "report", "report.html").is_file():
            take_report(browser, args.model, args.output_dir / "report.png")
        if args.compare:
            take_demo(browser, args)
    for path in sorted(args.output_dir.glob("*.png")):
        print(f"{path.stat().st_size / 1e3:,.0f} kB  {path}")


if __name__ == "__main__":
    main()
