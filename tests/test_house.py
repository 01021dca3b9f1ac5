"""The house: who imports whom, what a wheel holds, what README promises."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import fields

import pytest
from conftest import ROOT
from transformers import TrainingArguments

from smolpretrain.arguments import DataArguments, ModelArguments, PretrainArguments

ROOMS = {"arguments", "command_line", "plan", "planning", "data", "eval", "space", "hub", "training"}
ALLOWED = {
    ("training", "data.manifest"),
    # prepare.py and plan.py parse as run_pretrain.py does, and share the arguments that say what text is taken.
    *(("data", "command_line"), ("arguments", "data.arguments"), ("limits", "data.arguments")),
    # Whoever publishes, a set, a model or a Space, talks to the Hub the same way: one identity, one patience.
    *(("data", "hub.connection"), ("space", "hub.connection")),
    ("launch", "command_line"),  # to find output_dir as the run does
    *(("plan", name) for name in ("planning", "command_line", "arguments")),  # plan.py is planning/'s command
}
PRODUCT = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", "build", ".venv", "benchmarks", "runs"} & set(path.relative_to(ROOT).parts)
]


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Modules that a file imports, relative ones written from the root of the package."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def test_arrows_between_rooms_leave_only_from_run_pretrain():
    crossings = set()
    for path in PRODUCT:
        for name in imported(path):
            target = name.removeprefix("smolpretrain.").split(".")[0]
            if target in ROOMS and target != room(path) and room(path) != "run_pretrain":
                crossings.add((room(path), name))
    assert {c for c in crossings if not any(c[0] == a and c[1].startswith(b) for a, b in ALLOWED)} == set()
    assert room(ROOT / "run_pretrain.py") == "run_pretrain"
    assert {name.split(".")[0] for name in imported(ROOT / "run_pretrain.py")} >= {
        "arguments",
        "data",
        "eval",
        "training",
    }


def test_the_demo_is_uploaded_alone():
    """What deploy.py sends imports only what it sends."""
    for name in ("app.py", "page.py"):
        ours = {n.split(".")[0] for n in imported(ROOT / "space" / name)} & {*ROOMS, "smolpretrain", "static", "deploy"}
        assert ours <= {"space"}, "space/page.py, relative"
        local = [n for n in imported(ROOT / "space" / name) if n.startswith("space.")]
        assert {n.split(".")[1] for n in local} <= {"page"}


def test_no_module_bears_the_name_of_a_dependency():
    names = {path.stem for path in PRODUCT}
    assert not names & {"datasets", "evaluate", "tokenizers", "types", "transformers", "accelerate", "utils", "helpers"}


def test_files_stay_near_300_lines():
    assert {path.name: n for path in PRODUCT if (n := len(path.read_text().splitlines())) > 355} == {}


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_holds_one_top_level_name_and_its_data_files(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"smolpretrain"}
    shipped = {
        "run_pretrain.py",
        "args.json",
        "architectures.json",
        "ds_configs/zero2.json",
        "data/packing.py",
        "eval/perplexity.py",
        "eval/prompts.txt",
    }
    shipped |= {f"space/{name}" for name in ("app.py", "page.py", "README.md", "requirements.txt")}
    shipped |= {f"eval/educational/{name}" for name in ("items.jsonl", "educational.yaml", "README.md")}
    assert {f"smolpretrain/{name}" for name in shipped} <= set(names)
    assert not [name for name in names if "tests/" in name or "runs/" in name]


def test_readme_s_table_of_defaults_is_the_code_s():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    defaults = {f.name: f.default for cls in (ModelArguments, DataArguments, PretrainArguments) for f in fields(cls)}
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", readme, flags=re.MULTILINE)
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    assert {name for name, _ in rows} == {n for n in theirs if n in defaults and defaults[n] != theirs[n]}
    for name, value in rows:
        assert json.dumps(defaults[name]) == json.dumps(json.loads(value)), name


def test_readme_s_list_of_our_own_keys_is_the_code_s():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"Our own keys:\s+`([^`]+)`", readme)
    theirs = {f.name for f in fields(TrainingArguments)}
    ours = [f.name for cls in (ModelArguments, DataArguments, PretrainArguments) for f in fields(cls)]
    assert re.split(r",\s+", listed) == [name for name in ours if name not in theirs]


def test_readme_names_only_tests_that_there_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [name for path in ROOT.glob("tests/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())]
    promised = re.findall(r"`(test_[a-z0-9_]+)(\.\.\.)?`", readme)
    assert len(promised) > 40
    assert not [p for p, more in promised if not any(n == p or (more and n.startswith(p)) for n in names)]


def test_readme_has_no_gap_left_to_fill():
    assert "@@" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_s_two_commands_are_the_makefile_s():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for command in ("pip install -c constraints.txt -e .", "pip install -c constraints.txt -e '.[test]'"):
        assert command in readme and command in makefile
    for command in ("make train", "make test", "deepspeed run_pretrain.py args.json"):
        assert command in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("pattern", [r"/(?:home|root|work|mnt|Users)/\w", r"hf_[A-Za-z0-9]{20,}"])
def test_no_file_names_a_machine_s_path_or_a_token(pattern):
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert len(tracked.stdout.split()) > 30
    for name in tracked.stdout.split():
        if name.endswith((".py", ".md", ".json", ".cfg", ".toml", ".txt", ".yml", ".yaml", "Makefile", "run")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not [m for m in re.findall(pattern, text) if name != "tests/test_house.py"], name
