"""What others get: metadata as PyPI shows it, an sdist whose tests run, and workflows that are pinned."""

import ast
import re
import subprocess
import sys
import tarfile
from email.parser import BytesParser

import pytest
import yaml
from conftest import ROOT, copy_clone, tracked_files

import smolpretrain

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_clone(tmp_path_factory.mktemp("release") / "clone")


def build(what, target, clone):
    """Ask setuptools as pip does; the path of what it made."""
    code = f"from setuptools import build_meta; print(build_meta.{what}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=True)
    return target / done.stdout.split()[-1]


def test_what_pypi_shows_is_whole(clone, tmp_path):
    """Author, licence, addresses, systems; no link of README that only the repository can follow."""
    made = build("prepare_metadata_for_build_wheel", tmp_path, clone)
    metadata = BytesParser().parsebytes((made / "METADATA").read_bytes())
    assert metadata["Author"] == "smolpretrain developers" and metadata["License-Expression"] == "Apache-2.0"
    addresses = [line.split(", ") for line in metadata.get_all("Project-URL")]
    assert {name for name, _ in addresses} == {"Source", "Documentation", "Issues", "Changelog"}
    classifiers = metadata.get_all("Classifier")
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    page = metadata.get_payload(decode=True).decode()
    assert page.startswith("# smolpretrain") and metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 10 and not [link for link in links if not link.startswith("https://")]
    source = dict(addresses)["Source"]
    assert f"{source}/raw/main/docs/demo.png" in links and f"{source}/blob/main/docs/start.md" in links


def test_the_version_has_one_home(clone, tmp_path):
    made = build("prepare_metadata_for_build_wheel", tmp_path, clone)
    version = BytesParser().parsebytes((made / "METADATA").read_bytes())["Version"]
    assert version == smolpretrain.__version__
    literal = [
        path
        for path in tracked_files()
        if path.suffix == ".py" and path.parent.name != "tests"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == version
    ]
    assert literal == [ROOT / "__init__.py"]
    assert not re.search(rf"^version *= *{re.escape(version)}", (ROOT / "setup.cfg").read_text(), flags=re.M)


def test_the_changelog_begins_with_this_version_or_what_follows_it():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d[\d.]*|Unreleased)\b", text, flags=re.M)
    assert smolpretrain.__version__ in versions[:2]
    assert set(re.findall(r"^### (.*)$", text, flags=re.M)) <= {"Added", "Changed", "Fixed"}


def test_an_sdist_has_all_that_a_clone_has_and_its_tests_run(clone, tmp_path):
    made = build("build_sdist", tmp_path, clone)
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path, filter="data")
    there = tmp_path / made.name.removesuffix(".tar.gz")
    missing = [
        str(path.relative_to(ROOT)) for path in tracked_files() if not (there / path.relative_to(ROOT)).is_file()
    ]
    assert missing == []
    some = ["tests/test_make.py", "tests/test_house.py", "-k", "space or machine_s_path"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some]
    done = subprocess.run(command, cwd=there, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr


def steps():
    return [
        (name, step)
        for name, flow in WORKFLOWS.items()
        for job in flow["jobs"].values()
        for step in job.get("steps", [])
    ]


def test_actions_are_pinned_by_commit_and_may_only_read():
    used = [(name, step["uses"]) for name, step in steps() if "uses" in step]
    assert len(used) > 8
    assert [pair for pair in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", pair[1])] == []
    assert {name for name, flow in WORKFLOWS.items() if flow["permissions"] != {"contents": "read"}} == set()
    more = {
        (n, j): job["permissions"]
        for n, flow in WORKFLOWS.items()
        for j, job in flow["jobs"].items()
        if "permissions" in job
    }
    assert more == {("release", "publish"): {"id-token": "write"}}


def test_ci_tests_every_python_that_pypi_is_told_of():
    told = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    jobs = WORKFLOWS["ci"]["jobs"]
    assert jobs["fast"]["strategy"]["matrix"]["python"] == told
    assert {"lint", "fast", "slow", "docs"} == set(jobs) and not [job for job in jobs.values() if "needs" in job]
    run = [step.get("run", "") for _, step in steps()]
    assert {"mkdocs build --strict", "pytest -m slow"} <= set(run) and [r for r in run if r.endswith("&& pyright")]


@pytest.mark.parametrize("names", ["-m 'not slow' -n auto --dist loadfile"])
def test_make_fast_is_ci_s(names):
    assert f"pytest {names}" in {step.get("run") for _, step in steps()}
    assert f"pytest {names}" in (ROOT / "Makefile").read_text()
