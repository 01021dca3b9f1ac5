"""What README and docs/ say: short sentences, true names, and a site that builds and fetches nothing from others."""

import json
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import fields

import pytest
from conftest import ROOT
from transformers import TrainingArguments

from smolpretrain.__main__ import VERBS
from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md"]
LONGEST = 30  # words of a sentence
CLASSES = (ModelArguments, DataArguments, PretrainArguments)


def read(path):
    return path.read_text(encoding="utf-8")


def sentences(text):
    """Sentences of a page's prose: paragraphs, items, headings, table cells; code is one word, a link its text."""
    text = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->|</?\w[^>\n]*>", " ", text, flags=re.S)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*(?:[*+-]|\d+\.|#+|>)\s+", "\n", text, flags=re.M)  # items and headings begin anew
    text = re.sub(r"(#+ .*)\n", r"\1\n\n", text)
    for paragraph in re.split(r"\n\s*\n|\s*\|\s*", text):
        yield from re.split(r"(?<=[.!?])[\")*]*\s+(?=[\"(*A-Z0-9`]|code)", " ".join(paragraph.split()))


def test_a_long_sentence_is_found_wherever_it_stands():
    long = " ".join(["Word"] * (LONGEST + 1))
    for page in (
        long + ".",
        f"* one\n* {long}\n",
        f"| a | {long} |\n",
        f"Short. [{long}](x.md) Short.",
        f"## {long}\n",
    ):
        assert [s for s in sentences(page) if len(s.split()) > LONGEST], page
    short = " ".join(["Word"] * LONGEST)
    assert (
        max(len(s.split()) for s in sentences(f"{short}. {short}.\n* {short}\n* {short}\n\n`{long}` is code"))
        == LONGEST
    )


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_sentences_of_a_page_are_short(page):
    text = read(page)
    if page.name == "arguments.md":
        text = text.split("## TrainingArguments")[0]
    assert [s for s in sentences(text) if len(s.split()) > LONGEST] == []


def test_readme_is_a_front_door():
    lines = read(README).splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_nothing_is_left_to_fill_in():
    assert [page.name for page in PAGES if "@@" in read(page) or "TODO" in read(page)] == []


def test_the_two_commands_are_the_makefile_s():
    readme, makefile = read(README), read(ROOT / "Makefile")
    for command in ("pip install -c constraints.txt -e .", "pip install -c constraints.txt -e '.[test]'"):
        assert command in readme and command in makefile
    for command in ("make train", "make test", "deepspeed run_pretrain.py args.json"):
        assert command in readme
    assert "make test" in read(ROOT / ".ci" / "run")


def test_what_readme_says_a_run_leaves_is_in_the_tree_of_docs_outputs():
    drawn = [re.findall(r"^  ([\w.-]+/?) ", read(page).split("\nruns/first/\n")[1].split("```")[0], flags=re.M)
             for page in (README, ROOT / "docs" / "outputs.md")]  # fmt: skip
    assert set(drawn[0]) < set(drawn[1]) and len(drawn[0]) >= 5


def test_docs_name_only_tests_that_there_are():
    names = [name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", read(path))]
    text = "".join(map(read, PAGES))
    promised = re.findall(r"`(test_[a-z0-9_]+)(\.\.\.)?`", text)
    assert len(promised) > 40
    assert not [p for p, more in promised if not any(n == p or (more and n.startswith(p)) for n in names)]
    files = set(re.findall(r"\b(test_\w+\.py)", text))
    assert files and not files - {path.name for path in ROOT.glob("tests/**/*.py")}


def test_docs_name_only_files_that_there_are():
    """Commands and prose name files of this repository: each is there."""
    found = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(
            r"\b((?:data|training|eval|planning|hub|space|benchmarks|configs|ds_configs|docs|tests)/[\w./-]*\.\w+)",
            read(page),
        )
    }
    assert len(found) > 60
    assert {(page, name) for page, name in found if not (ROOT / name).exists()} == {("recipes.md", "configs/NAME.json")}


def test_the_table_of_defaults_is_the_code_s():
    defaults = {f.name: f.default for cls in CLASSES for f in fields(cls)}
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", read(ROOT / "docs" / "defaults.md"), flags=re.MULTILINE)
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    assert {name for name, _ in rows} == {n for n in theirs if n in defaults and defaults[n] != theirs[n]}
    for name, value in rows:
        assert json.dumps(defaults[name]) == json.dumps(json.loads(value)), name


def test_the_page_of_arguments_has_every_key_with_its_help():
    text = read(ROOT / "docs" / "arguments.md")
    made = runpy.run_path(str(ROOT / "docs" / "make_arguments.py"))["page"]()
    assert text == made, "stale: python docs/make_arguments.py --write"
    keys = {f.name for cls in CLASSES for f in fields(cls) if f.init}
    assert keys == {*re.findall(r"^### (\w+)$", text, flags=re.M), *re.findall(r"^\| `(\w+)` \|", text, flags=re.M)}
    words = " ".join(text.split())
    for cls in (ModelArguments, DataArguments):
        for f in fields(cls):
            assert " ".join(f.metadata["help"].split()) in words


def test_the_table_of_verbs_is_the_command_s():
    rows = re.findall(
        r"^\| `(\w+)` \| `([\w/]+)\.py` \| (.*) \|$", read(ROOT / "docs" / "start.md"), flags=re.MULTILINE
    )
    assert {verb: (path.replace("/", "."), said) for verb, path, said in rows} == VERBS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_builds_and_every_page_is_in_it(site):
    pages = {path.name for path in site.glob("*.html")}
    assert pages >= {"index.html", *(f"{page.stem}.html" for page in PAGES[1:])}
    menu = re.findall(r'<a href="([\w.-]+html)" class="md-nav__link', read(site / "data.html"))
    assert {f"{page.stem}.html" for page in PAGES[1:]} - {"data.html"} <= set(menu), "a page that no menu leads to"


def test_the_site_loads_nothing_from_others(site):
    """Links may lead away; what a browser fetches by itself may not."""
    fetched = r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc="([^"]+)"|<link\b[^>]*?\bhref="([^"]+)"|url\(([^)]+)\)"""
    found = {
        (path.name, target)
        for path in site.rglob("*")
        if path.suffix in (".html", ".css")
        for target in map("".join, re.findall(fetched, read(path)))
    }
    assert len(found) > 50
    assert {(page, target) for page, target in found if re.match(r"[\"']?(?:https?:)?//", target)} == set()


def test_the_site_s_links_out_of_docs_go_to_the_repository(site):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    (url,) = re.findall(r"^Source *= *(\S+)$", config["metadata"]["project_urls"], flags=re.MULTILINE)
    links = re.findall(rf'href="{re.escape(url)}/blob/main/([^"#]+)"', "".join(map(read, site.glob("*.html"))))
    assert {"configs/slurm.sh", "CONTRIBUTING.md", "eval/educational/README.md"} <= set(links)
    assert not [name for name in links if not (ROOT / name).exists()]
