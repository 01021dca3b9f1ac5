"""docs/tutorial.md, run as it is read: every command of it in one shell, in a checkout of its own, on a loopback Hub.

What is reduced is what the variables of its first block stand for, and nothing else. Plans are of the real run.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import httpx
import psutil
import pytest
from conftest import BIN, ROOT, copy_clone, free_port
from gradio_client import Client
from test_recipes import CORPUS, TOKENIZER, card, parquet, recipe_of, reduced, texts
from transformers import LlamaConfig, LlamaForCausalLM

from smolpretrain.data.tokens.tokenization import train_tokenizer

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
NOT_RUN = {  # how a command begins that the test leaves out, and why
    "sudo ": "needs root and a network",
    "git clone ": "the checkout is made of the tree under test",
    "cd smolpretrain": "the same",
    "python3 -m venv ": "the tests' own environment takes its place",
    ". .venv/bin/activate": "the same",
    "pip install ": "the first line of CI, with another extra",
    "hf auth login": "asks a person; HF_TOKEN takes its place",
}
RECIPE, DATA, FIRST, LAST = "smollm2-135m-1x24gb", "data-fineweb-edu-5b", 10**6, 12  # steps before STOP, and after it
PATIENCE = 900  # seconds, for whatever hangs; no claim is about time


@dataclass
class Block:
    """Commands of one block of the page, and the lines that it says one sees."""

    commands: list[str]
    seen: list[str]


def blocks():
    """The page's blocks of commands, a line that ends in a backslash joined to its next."""
    found = []
    for kind, content in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if kind == "bash":
            found.append(Block(re.sub(r"\\\n *", "", content).splitlines(), []))
        else:
            assert kind == "text" and not found[-1].seen, "what is seen follows its commands"
            found[-1].seen = content.splitlines()
    return found


class Shell:
    """One bash for the whole page, so that its variables and its job in the background live as a reader's do."""

    def __init__(self, directory, environment):
        self.process = subprocess.Popen(
            ["bash"], cwd=directory, env=environment, text=True, bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, command, expect=0):
        """What a command printed, on either stream; fails where its status is another."""
        watch = threading.Timer(PATIENCE, os.killpg, (self.process.pid, signal.SIGKILL))
        watch.start()
        self.process.stdin.write(f"{command}\nstatus=$?; echo; echo ended with $status\n")
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("ended with "):
                break
        watch.cancel()
        assert lines and lines[-1] == f"ended with {expect}\n", f"{command}\n{''.join(lines)[-5000:]}"
        return "".join(lines[:-1])

    def end(self):
        """Whatever a test that failed has left of its jobs ends with the shell."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()


def until(condition):
    """A loop of the shell that ends with a condition of `test`, or with the training."""
    return f"until [ {condition} ]; do kill -0 $TRAINING || break; sleep 0.1; done"


# What a reader does between two commands: {command: (what, its status)}. They wait for what they look at.
BEFORE = {
    "tail -n 1 $RUN/metrics.jsonl": (until("-s $RUN/metrics.jsonl"), 0),
    "tail -n 3 train.log": ("wait $TRAINING", 0),
}
AFTER = {
    "touch $RUN/SAVE": (until("! -e $RUN/SAVE"), 0),
    "touch $RUN/STOP": ("wait $TRAINING", 75),
}


def written_by(model):
    """A demo's continuation of a prompt, asked for as any program asks for it: a list, one entry a model."""
    answer = Client(model, verbose=False, httpx_kwargs={"timeout": PATIENCE}).predict(
        prompt="Once more", max_new_tokens=4, temperature=0, api_name="/continue"
    )
    return answer


def serve(shell, command):
    """Start a demo, open its page, let it write, press Ctrl-C; returns what it wrote."""
    shell.run(f"set -m; {command} > demo.log 2>&1 & DEMO=$!")  # -m: or a job in the background is deaf to SIGINT
    address = None
    while not address:
        shell.run("kill -0 $DEMO || cat demo.log")
        shell.run("kill -0 $DEMO")
        said = shell.run("cat demo.log")
        address = re.search(r"http://127\.0\.0\.1:\d+", said) and re.search(r"URL: +(http\S+)", said)
        time.sleep(0.2)
    page = httpx.get(address[1], timeout=PATIENCE)
    assert page.status_code == 200 and "gradio" in page.text
    wrote = written_by(address[1])
    shell.run("kill -INT $DEMO; wait $DEMO; set +m")
    return wrote


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, as `git clone` would make it."""
    return copy_clone(tmp_path_factory.mktemp("tutorial") / "smolpretrain")


@pytest.fixture(scope="module")
def corpus(hub, tmp_path_factory):
    """What the page takes from the Hub, under its own names: text, tokenizer, the released model."""
    directory = tmp_path_factory.mktemp("released")
    train_tokenizer(texts(1), 500).save_pretrained(directory)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0)).save_pretrained(directory)
    hub.add("model", TOKENIZER, {path.name: path.read_bytes() for path in directory.iterdir()})
    files = {
        "fineweb-edu-dedup/train-00000-of-00001.parquet": parquet(texts(4)),
        "README.md": card("fineweb-edu-dedup"),
    }
    hub.add("dataset", CORPUS, files)


class Small:
    """The page's variables, smaller: its two recipes at the size of tests/test_recipes.py, on one rank."""

    def __init__(self, checkout):
        self.checkout = checkout
        words = dict(word.split("=", 1) for word in reduced(RECIPE))
        kept = {key: json.loads(value) for key, value in words.items() if key != "keep_every_steps"}
        self.recipe = recipe_of(RECIPE) | kept | {"save_steps": 200, "eval_steps": 200, "max_steps": FIRST}
        both = ("validation_fraction", "block_size", "max_tokens")
        self.write("small.json", self.recipe)
        self.write("small-data.json", recipe_of(DATA) | {key: self.recipe[key] for key in both})
        launch = f"'deepspeed --master_port {free_port()}'"
        self.assignments = f"RECIPE=small.json DATA=small-data.json BATCH=gradient_accumulation_steps=2 LAUNCH={launch}"

    def write(self, name, recipe):
        (self.checkout / name).write_text(json.dumps(recipe), encoding="utf-8")

    def shorten(self):
        """Let the run end soon after the step at which it was stopped."""
        directory = self.checkout / self.recipe["output_dir"]
        step = max(int(path.name.rpartition("-")[2]) for path in directory.glob("checkpoint-*"))
        self.write("small.json", self.recipe | {"max_steps": step + LAST})


def expanded(line, variables):
    for name in sorted(variables, key=len, reverse=True):
        line = line.replace(f"${name}", variables[name])
    return line


def missing(seen, said):
    """The first line that the page says one sees, and that does not come, in this order; None where all do."""
    lines = iter(" ".join(line.split()) for line in said.splitlines())
    for wanted in seen:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in wanted.split("...")))
        if not any(pattern.search(line) for line in lines):
            return wanted
    return None


@pytest.fixture(scope="module")
def read(hub, checkout, corpus, tmp_path_factory):
    """The whole page, read and done; returns [(block, what its commands printed)] and the page's variables."""
    home = tmp_path_factory.mktemp("home")
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment = inherited | hub.environment(home) | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    shell, small, shrunk, variables, done = Shell(checkout, environment), Small(checkout), False, {}, []
    try:
        for block in blocks():
            said = ""
            for command in block.commands:
                if command.startswith(tuple(NOT_RUN)):
                    continue
                if given := re.match(r"([A-Z]+)=(\S+)", command):
                    variables[given[1]] = given[2]
                elif not shrunk and not command.startswith("python plan.py "):
                    shrunk = shell.run(small.assignments) is not None
                for what, status in filter(None, [BEFORE.get(command)]):
                    shell.run(what, status)
                served = command.startswith("python space/app.py ")
                said += json.dumps(serve(shell, command)) if served else shell.run(command)
                if command.startswith("nohup "):
                    shell.run("TRAINING=$!")
                for what, status in filter(None, [AFTER.get(command)]):
                    shell.run(what, status)
                if command == "touch $RUN/STOP":
                    small.shorten()
            done.append((block, said))
    finally:
        shell.end()
    return done, variables


@pytest.mark.slow
def test_every_command_of_the_page_ends_well_and_shows_what_the_page_says(read):
    done, variables = read
    for block, said in done:
        wanted = missing([expanded(line, variables) for line in block.seen], said)
        assert wanted is None, f"{block.commands}\nnot seen: {wanted}\nbut:\n{said[-5000:]}"


@pytest.mark.slow
def test_what_it_ends_with_is_public_and_the_live_space_writes(read, hub, tmp_path):
    _, variables = read
    name = variables["REPO"]
    assert not any(hub.repos[key].private for key in (("model", name), ("space", name), ("space", f"{name}-report")))
    space = hub.repos["space", name]
    for file, content in space.files().items():
        (tmp_path / file).write_bytes(content)
    environment = os.environ | hub.environment(tmp_path / "home", "") | space.variables | {"OMP_NUM_THREADS": "1"}
    shell = Shell(tmp_path, environment)
    try:
        (wrote,) = serve(shell, f"{sys.executable} app.py")
        assert wrote["model"] == name and wrote["new_tokens"] == 4
    finally:
        shell.end()


def test_every_exception_from_running_is_one_that_the_page_has_and_each_reading_pause_belongs_to_a_command():
    commands = [command for block in blocks() for command in block.commands]
    assert [begins for begins in NOT_RUN if not any(command.startswith(begins) for command in commands)] == []
    assert {*BEFORE, *AFTER} <= {*commands}
    assert sum(command.startswith(tuple(NOT_RUN)) for command in commands) == len(NOT_RUN) < len(commands) / 4


def test_the_set_that_the_page_prepares_is_the_one_that_its_recipe_trains_on():
    assert {key: recipe_of(RECIPE).get(key) for key in recipe_of(DATA) if key != "tokenizer_name"} == {
        key: value for key, value in recipe_of(DATA).items() if key != "tokenizer_name"
    }
