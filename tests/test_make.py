"""`make` where a path has a space: one environment, inside the clone, and nothing installed into the caller's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT

TOOL = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case "$*" in
    "-m venv "*) for d in "$3"; do mkdir -p "$d/bin"; cp "$0" "$d/bin/python"; cp "$0" "$d/bin/pip"; done;;
esac
"""


LINK = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[2] + "/in_place.py")
from smolpretrain.core import upstream
from torch.utils import cpp_extension
assert " " in cpp_extension.TORCH_LIB_PATH
upstream.link_where_paths_have_spaces()
upstream.link_where_paths_have_spaces()
cpp_extension.load("one", ["one.cpp"], is_python_module=False)
"""


@pytest.mark.slow
def test_an_extension_links_where_torch_lies_in_a_path_with_a_space(tmp_path):
    """What DeepSpeed does on a CPU; torch quotes what it includes, and not where its libraries are."""
    packages, built = tmp_path / "my models" / "packages", tmp_path / "my models" / "built"
    built.mkdir(parents=True)
    packages.symlink_to(Path(torch.__file__).parents[1])
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    subprocess.run(
        [sys.executable, "-c", LINK, packages, ROOT], cwd=tmp_path, check=True, timeout=600,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(built), "PATH": f"{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert list(built.rglob("one.so"))


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("train", "launch.py deepspeed run_pretrain.py args.json max_steps=3"),
        ("test", "-m pytest -n 2 --dist loadfile max_steps=3"),
        ("fast", "-m pytest -m not slow -n auto --dist loadfile max_steps=3"),
        ("docs", "-m mkdocs build --strict"),
    ],
)
def test_make_in_a_path_with_a_space_uses_one_environment_in_the_clone(target, runs, tmp_path):
    """A stand-in for Python notes what is asked of it: it is the Makefile that is tested."""
    clone, caller, log = tmp_path / "my models" / "a clone", tmp_path / "caller", tmp_path / "log"
    clone.mkdir(parents=True)
    caller.mkdir()
    for name in ("python3", "python", "pip"):
        (caller / name).write_text(TOOL)
        (caller / name).chmod(0o755)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone / name)
    environment = os.environ | {"PATH": f"{caller}:{os.environ['PATH']}", "LOG": str(log)}
    for _ in range(2):
        subprocess.run(
            ["make", target, "ARGS=max_steps=3"], cwd=clone, env=environment, check=True, capture_output=True
        )
    assert [path.name for path in clone.parent.iterdir()] == ["a clone"] and {".venv"} == {
        path.name for path in clone.iterdir() if path.is_dir()
    }
    asked = log.read_text().splitlines()
    assert sum(" -m venv " in line for line in asked) == sum(" -m pip install " in line for line in asked) == 1
    ours = str(clone / ".venv" / "bin" / "python")
    assert not [line for line in asked if " -m pip " in line and not line.startswith(ours)], "into the caller's"
    assert asked[-1] == f"{ours} {runs}"
