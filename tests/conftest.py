"""What the tests share: no network, a small corpus of uneven documents, and launches as a user launches."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
from loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """JSON lines of documents of 5 to 400 words, so that rows hold unequal numbers of documents and targets."""
    random.seed(0)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split() + (ROOT / "LICENSE").read_text().split()
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(300):
            text = " ".join(random.choices(words, k=random.choice([5, 20, 80, 400])))
            file.write(json.dumps({"text": text, "kind": "mixed"}) + "\n")
    return path


@pytest.fixture(scope="session")
def hub():
    """A Hub on loopback, see loopback_hub.py; each test names repositories of its own."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="session")
def launch():
    """Run a command of the project as a user does; returns its CompletedProcess, output in text."""

    def run(*command, cwd=ROOT, timeout=900, expect=0, **environment):
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        }
        done = subprocess.run(
            [str(BIN / command[0]) if (BIN / command[0]).exists() else command[0], *map(str, command[1:])],
            cwd=cwd,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == expect, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return run
