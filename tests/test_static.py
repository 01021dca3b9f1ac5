"""Claims about the static Space: one page in a real browser, with no server and no network, from what a run left."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from browser import PATIENCE, opened, until, widest
from conftest import ROOT, SECRETS
from huggingface_hub import RepoCard

from smolpretrain.space import static

pytestmark = pytest.mark.slow
HOME = "/home" + "/somebody"
HOSTILE = "</script><script>document.title='taken'</script><img src='http://127.0.0.1:9/x.png' onerror='alert(1)'> <b>"
CONTRAST = """() => {
  const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = (at) => {
    while (at && getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
    return at ? getComputedStyle(at).backgroundColor : "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("h1,h2,h3,p,th,td,b,span,label,select,summary,code,small")].map((at) => {
    const pair = [light(getComputedStyle(at).color), light(paper(at))];
    return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  });
}"""


@pytest.fixture(scope="module")
def page(compared_run, tmp_path_factory):
    where = tmp_path_factory.mktemp("static")
    static.main([str(compared_run), "--output_dir", str(where), "--repo", "user/tiny", "--license", "mit"])
    return where / "index.html"


@pytest.fixture
def run(compared_run, tmp_path):
    """A copy of the compared run that a test may change."""
    return Path(shutil.copytree(compared_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.arrow", "lm_eval")))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words(shown, side):
    """What a pane says: its heading, its settings, the prompt and the text."""
    pane = shown.locator(f"#{side}-pane")
    return [pane.locator(at).text_content() for at in ("h3", ".how", ".words b", ".words span")]


def asked_for(shown):
    return [url for url in shown.requests if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_asks_for_nothing_has_no_error_and_fits_its_window(page, width):
    with opened(page, width) as shown:
        assert asked_for(shown) == [] and shown.errors == [] and widest(shown) <= 0
        assert shown.locator("img").count() >= 6
        for image in shown.locator("img").all():
            assert image.evaluate("i => i.naturalWidth") > 0 and len(image.get_attribute("alt")) > 30
        assert shown.locator("h1").count() == 1 and shown.locator("h2", has_text="Pre-training report").count() == 1
        below = shown.locator("#right-pane").bounding_box()["y"] > shown.locator("#left-pane").bounding_box()["y"]
        assert below == (width == 390), "side by side where there is room, one below the other on a phone"
        fonts = shown.evaluate("[...document.querySelectorAll('*')].map((at) => getComputedStyle(at).fontFamily)")
        assert all(
            font.startswith(("system-ui", "ui-monospace")) for font in fonts if "serif" in font or "mono" in font
        )


def test_prompt_and_both_sides_are_chosen_by_keyboard_alone(page, compared_run):
    rows, written = (rows_of(compared_run / name) for name in ("samples.jsonl", "report/comparison_samples.jsonl"))
    prompts = list(dict.fromkeys(row["prompt"] for row in [*rows, *written]))
    text = {(row["step"], row["prompt"]): static.many_breaks(row["text"]) for row in rows}
    with opened(page) as shown:
        assert words(shown, "left")[2:] == [prompts[0], text[6, prompts[0]]]
        assert words(shown, "right")[2:] == [prompts[0], text[12, prompts[0]]]
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.id") == "prompt"
        assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        shown.keyboard.press("ArrowDown")
        assert words(shown, "left") == [
            "step 6, 1,536 tokens",
            "greedy, 48 new tokens at most",
            prompts[1],
            text[6, prompts[1]],
        ]
        shown.keyboard.press("Tab")
        shown.keyboard.press("End")
        label, settings, prompt, said = words(shown, "left")
        assert label == "run, sampled 2" and prompt == prompts[1] and said == " (not written for this prompt)"
        assert settings == "sampled, temperature 0.8, top_p 0.95, seed 3, 8 new tokens at most"
        shown.keyboard.press("Shift+Tab")
        shown.keyboard.press("End")
        (last,) = (row for row in written if (row["model"], row["prompt"], row["decoding"], row["sample"])
                   == ("run", prompts[-1], "sampled", 1))  # fmt: skip
        assert words(shown, "left")[2:] == [prompts[-1], static.many_breaks(last["text"])]
        assert prompts[-1] == "Once <b>more</b> | `x`", "a prompt is text, not markup"
        for _ in range(3):
            shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.id") not in ("prompt", "left", "right"), "no trap"


def test_controls_have_names_and_a_change_is_told(page):
    with opened(page) as shown:
        for name in ("Prompt", "Left", "Right"):
            assert shown.get_by_role("combobox", name=name, exact=True).count() == 1
        for side in ("left", "right"):
            heading = shown.locator(f"#{side}-pane h3").text_content()
            assert shown.get_by_role("article", name=heading).count() >= 1
        assert shown.locator(".panes").get_attribute("aria-live") == "polite"
        assert shown.get_by_role("region", name="Side by side").count() == 1
        assert shown.locator("html").get_attribute("lang") == "en" and shown.title() == "tiny"
        levels = shown.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((at) => Number(at.tagName[1]))")
        assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_can_both_be_read(page, scheme):
    with opened(page) as shown:
        shown.emulate_media(color_scheme=scheme)
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == (scheme == "dark")
        ratios = shown.evaluate(CONTRAST)
        assert len(ratios) > 100 and min(ratios) >= 4.5, "WCAG 2.2, 1.4.3"


def test_without_scripts_the_first_pair_and_all_samples_stand_there(page):
    with opened(page) as shown:
        plain = shown.context.browser.new_context(java_script_enabled=False).new_page()
        plain.set_default_timeout(1000 * PATIENCE)
        plain.goto(page.as_uri())
        assert plain.locator(".choose").is_hidden() and "step 6" in plain.locator("#left-pane h3").text_content()
        assert plain.locator("details").count() == 2 and plain.locator("details .sample").count() >= 20
        assert plain.locator("noscript").inner_text() == "Choosing others needs JavaScript."


def test_nothing_that_was_recorded_is_markup_and_the_policy_would_stop_it(run, hub, tmp_path):
    rows, written = (rows_of(run / name) for name in ("samples.jsonl", "report/comparison_samples.jsonl"))
    for row in [*rows, *written]:
        row |= {"prompt": row["prompt"] + HOSTILE, "text": HOSTILE}
    for row in written:
        row["model"] += HOSTILE
    write_rows(run / "samples.jsonl", rows)
    write_rows(run / "report" / "comparison_samples.jsonl", written)
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["init_from"] = HOSTILE
    (run / "run.json").write_text(json.dumps(record))
    report = run / "report" / "report.html"
    put = "<script>document.title='report'</script>"
    put += "".join(f"<{tag} src='{hub.endpoint}/a-{tag}'></{tag}>" for tag in ("img", "iframe", "audio"))
    report.write_text(report.read_text().replace("</main>", f"{put}</main>"))
    static.write_page(run, tmp_path / "out")
    with opened(tmp_path / "out" / "index.html") as shown:
        shown.keyboard.press("Tab")
        shown.keyboard.press("ArrowDown")
        assert shown.title() == "run" and shown.locator(".pane img").count() == 0
        assert words(shown, "left")[3] == HOSTILE and hub.count("GET", "/a-") == 0
        until(lambda: len(shown.errors) >= 4, shown)
        assert len(shown.errors) == 4, "what was put into the report"
        assert all("Content Security Policy" in error for error in shown.errors), shown.errors
    (run / "samples.jsonl").unlink()
    static.write_page(run, tmp_path / "compared")
    with opened(tmp_path / "compared" / "index.html") as shown:
        assert words(shown, "left")[0].startswith(f"random run{HOSTILE}, ") and shown.locator(".pane img").count() == 0


def test_no_path_and_no_token_reaches_the_page(run, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    rows = rows_of(run / "samples.jsonl")
    rows[-1]["text"] = f"\n{run}/x.txt {SECRETS['HF_TOKEN']} {SECRETS['WANDB_API_KEY']} \ud800 and/or https://a.org/b/c"
    write_rows(run / "samples.jsonl", rows)
    report = run / "report" / "report.html"
    report.write_text(
        report.read_text().replace("</main>", f"<p>{run}/a b {HOME} {SECRETS['GITHUB_TOKEN']}</p></main>")
    )
    static.write_page(run, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for forbidden in (str(run), str(run.parent), "somebody", *SECRETS.values()):
        assert forbidden not in text, forbidden
    assert "\\nx.txt [removed] [removed] ? and/or https://a.org/b/c" in text
    for picture in re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", report.read_text()):
        assert picture in text


def test_a_run_with_less_says_what_is_missing(run, tmp_path):
    shutil.rmtree(run / "report")
    write_rows(run / "samples.jsonl", rows_of(run / "samples.jsonl")[:1])
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 12, "te')
    static.write_page(run, tmp_path / "one")
    with opened(tmp_path / "one" / "index.html", 390) as shown:
        assert shown.errors == [] and widest(shown) <= 0
        assert "There is none yet: python eval/report.py" in shown.locator("main").inner_text()
        assert shown.locator("#left option").count() == 1
    (run / "samples.jsonl").unlink()
    static.write_page(run, tmp_path / "none")
    with opened(tmp_path / "none" / "index.html") as shown:
        assert shown.errors == [] and "This run wrote no samples" in shown.locator("main").inner_text()


def test_the_folder_is_a_whole_static_space(page, run, tmp_path):
    assert sorted(path.name for path in page.parent.iterdir()) == ["README.md", "index.html"]
    front = RepoCard.load(page.with_name("README.md")).data.to_dict()
    assert front["sdk"] == "static" and front["app_file"] == "index.html" and front["license"] == "mit"
    assert front["models"] == ["user/tiny"] and front["short_description"] == "Report and samples of tiny"
    static.write_page(run, tmp_path / "out", f"user/{'long' * 20}")
    assert len(RepoCard.load(tmp_path / "out" / "README.md").data.short_description) == 60, "the Hub takes no more"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run / "run.json").unlink(), "no run.json of a run"),
        (lambda run: (run / "run.json").write_text("{"), "run.json: it is no JSON"),
        (lambda run: (run / "samples.jsonl").write_text("{\n{}\n"), "samples.jsonl: line 1 is no JSON"),
        (lambda run: (run / "samples.jsonl").write_text("{}\n"), "its record is not as a run writes it"),
        (lambda run: (run / "report" / "report.html").write_text("<p>"), "report.html: not a page of eval/report.py"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, tmp_path, spoil, reason):
    spoil(run)
    done = subprocess.run([sys.executable, ROOT / "space" / "static.py", run, "--output_dir", tmp_path / "out"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and reason in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
