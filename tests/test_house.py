"""The house: who imports whom, what a wheel holds, what no file names."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, tracked_files

PRODUCT = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", "build", ".venv", "benchmarks", "runs", "docs"} & set(path.relative_to(ROOT).parts)
]
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
IN_PLACE = 'if "smolpretrain" not in sys.modules:'  # how a file says that it is run from a clone
COMMANDS = {path for path in PRODUCT if IN_PLACE in path.read_text(encoding="utf-8")}
ALLOWED = {  # beside what commands import: (room or top-level file, what it may ask of another)
    # Whoever publishes, a set, a model or a Space, talks to the Hub the same way: one identity, one patience.
    ("data", "hub.connection"),
    # The arguments of a run are checked against DeepSpeed's file, and share those that say what text is taken.
    *(("arguments", name) for name in ("ds_configs", "limits", "data.arguments")),
    ("limits", "data.arguments"),
}


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in PRODUCT}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def names(path, tops=False):
    """(module of ours, how it is written) of each import of a file; tops: of those that run when it is imported."""
    package = ["smolpretrain", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in (tree.body if tops else ast.walk(tree)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found = [(alias.name, "import") for alias in node.names]
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            kind = "relative" if node.level else "absolute"
            found = [(f"{base}.{alias.name}", kind) for alias in node.names]
        for name, kind in found:
            if name.split(".")[0] == "smolpretrain":
                own = name.removeprefix("smolpretrain").removeprefix(".")
                yield own if own in MODULES else own.rpartition(".")[0], kind


def imported(path):
    """Modules that a file imports, ours from the root of the package, others' as they are written."""
    yield from (name for name, _ in names(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def crossings(path):
    for name, _ in names(path):
        target = name.split(".")[0]
        if name and target != room(path) and target != "core" and target != "in_place":
            yield room(path), name


def test_arrows_between_rooms_leave_from_commands_alone():
    assert {"core", "data", "training", "eval", "hub", "space", "planning"} <= ROOMS
    assert {module(path) for path in COMMANDS} >= {"run_pretrain", "plan", "launch", "data.prepare", "eval.perplexity"}
    found = {crossing for path in PRODUCT if path not in COMMANDS for crossing in crossings(path)}
    assert {c for c in found if not any(c[0] == a and c[1].startswith(b) for a, b in ALLOWED)} == set()
    assert {room for room, _ in ALLOWED} == {room for room, _ in found}, "what is allowed is needed"
    assert not [name for path in (ROOT / "core").glob("*.py") for _, name in crossings(path)]


def test_no_import_goes_in_a_circle():
    """What a command asks for once it runs, as eval/perplexity.py asks for its options, closes no circle."""
    asked = {module(p): {name for name, _ in names(p, tops=p in COMMANDS) if name} - {module(p)} for p in PRODUCT}
    while ends := {name for name, others in asked.items() if not others & asked.keys()}:
        asked = {name: others for name, others in asked.items() if name not in ends}
    assert asked == {}


def test_an_import_is_written_one_way():
    """Relative inside a room, from the package's name across rooms and in what is run as a file."""
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        assert "__package__" not in text, path
        for name, kind in names(path):
            inside = name.split(".")[0] == room(path) and path not in COMMANDS
            assert kind == ("relative" if inside else "absolute"), (path, name)


def test_the_demo_is_uploaded_alone():
    """What deploy.py sends imports only what it sends."""
    for name in ("app.py", "page.py"):
        ours = {
            n
            for n in imported(ROOT / "space" / name)
            if n.split(".")[0] in {*ROOMS, "smolpretrain", "static", "deploy"}
        }
        assert ours <= {"space.page"}, "it lies beside app.py on the Hub too"


def test_no_module_bears_the_name_of_a_dependency():
    names = {path.stem for path in PRODUCT}
    assert not names & {"datasets", "evaluate", "tokenizers", "types", "transformers", "accelerate", "utils", "helpers"}


def test_files_stay_within_300_lines_and_the_story_within_180():
    """eval/perplexity.py lies alone under evaluate.load; json_lines.py is one format, whole."""
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in PRODUCT}
    longer = {name: count for name, count in lengths.items() if count > 300}
    assert longer.keys() <= {
        "eval/perplexity.py",
        "data/read/forms/json_lines.py",
        "arguments.py",
        "data/arguments.py",
    }, longer
    assert max(longer.values(), default=0) < 370 and lengths["run_pretrain.py"] < 180


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
        "py.typed",
        "core/architectures.json",
        "ds_configs/zero2.json",
        "data/pack/packing.py",
        "eval/perplexity.py",
        "eval/parts/prompts.txt",
    }
    shipped |= {f"space/{name}" for name in ("app.py", "page.py", "README.md", "requirements.txt")}
    shipped |= {f"eval/educational/{name}" for name in ("items.jsonl", "educational.yaml", "README.md")}
    assert {f"smolpretrain/{name}" for name in shipped} <= set(names)
    assert not [name for name in names if "tests/" in name or "runs/" in name]


@pytest.mark.parametrize("pattern", [r"/(?:home|root|work|mnt|Users)/\w", r"hf_[A-Za-z0-9]{20,}"])
def test_no_file_names_a_machine_s_path_or_a_token(pattern):
    tracked = tracked_files()
    assert len(tracked) > 30
    for path in tracked:
        if path.name.endswith((".py", ".md", ".json", ".cfg", ".toml", ".txt", ".yml", ".yaml", "Makefile", "run")):
            text = path.read_text(encoding="utf-8")
            assert not [m for m in re.findall(pattern, text) if path.name != "test_house.py"], path
