"""What the tests share: no network, a small corpus of uneven documents, and launches as a user launches."""

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ |= {
    "HF_HUB_ETAG_TIMEOUT": "300",
    "HF_HUB_DOWNLOAD_TIMEOUT": "300",
}  # 10 s may be few on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: on a loaded machine two threads took four times as long

import pytest
from huggingface_hub import constants, utils
from loopback_hub import LoopbackHub
from ports import free_port

ROOT = Path(__file__).parents[1]
runpy.run_path(str(ROOT / "in_place.py"))  # what is tested is this clone, whatever is installed
BIN = Path(sys.executable).parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup's jobs ignore it, and so would all that tests start
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECRETS = {  # what a user's environment may hold, none of it real
    "HF_TOKEN": "hf_" + "x0Y1" * 9,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "z2W3" * 9,
    "WANDB_API_KEY": "fedcba9876543210" * 2 + "fedcba98",
    "AWS_ACCESS_KEY_ID": "AKIA" + "Z9Y8X7W6" * 2,
    "AWS_SECRET_ACCESS_KEY": "q/W+e" * 8,
    "GITHUB_TOKEN": "ghp_" + "m4N5" * 9,
}


def tracked_files():
    """Files of this project as git knows them; in an sdist, which has no git, as it was packed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        names = (ROOT / "smolpretrain.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
        names = [name for name in names if ".egg-info/" not in name]
    else:
        names = listed.stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def copy_clone(where):
    """A clone of its own, for what writes beside its sources."""
    for path in tracked_files():
        copy = where / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return where


@contextlib.contextmanager
def nothing_left():
    """Random numbers from the start; what a run leaves in the environment (accelerate: RANK) and of handlers ends."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    before, handlers = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def alone():
    with nothing_left():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """A fixture that several tests share is made before `alone` looks: what it leaves would stay."""
    if fixturedef.scope == "function":
        return (yield)
    with nothing_left():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def forks_hear():
    """A run inside this process would block signals in whatever is forked later: in every test's workers."""
    if guards := sys.modules.get("smolpretrain.training.safety.guards"):
        guards.deafen_forks = lambda: None


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """JSON lines of documents of 5 to 400 words, so that rows hold unequal numbers of documents and targets."""
    random.seed(0)
    words = (ROOT / "LICENSE").read_text().split()
    with open(ROOT / "eval" / "educational" / "items.jsonl", encoding="utf-8") as items:
        words += [word for line in items for word in json.loads(line)["question"].split()]
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


def note_waits(monkeypatch, waits):
    """What talks to the Hub notes its waits and makes none; whatever else waits in this process goes on doing so."""
    from smolpretrain.hub import connection

    for module in (connection, utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """This process as a client of the loopback Hub: commands are called in it; waits between tries are noted instead.

    Attributes of what it returns are the Hub's, and `waits` in seconds.
    """
    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    hub.faults.clear()
    hub.waits = []
    note_waits(monkeypatch, hub.waits)
    yield hub
    hub.faults.clear()


@pytest.fixture(scope="session")
def launch():
    """Run a command of the project as a user does; returns its CompletedProcess, output in text."""

    def run(*command, cwd=ROOT, timeout=900, expect=0, **environment):
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        }
        if command[0] in ("deepspeed", "torchrun"):
            command = (command[0], "--master_port", free_port(), *command[1:])
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


@pytest.fixture(scope="session")
def wires():
    """(benchmarks/wire.py, benchmarks/scaling.py), where this user may make network namespaces."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import scaling
    import wire

    if why := wire.refusal():
        pytest.skip(why)
    return wire, scaling


@pytest.fixture(scope="session")
def small_words(tmp_path_factory):
    """Words of a small run: 60 rows, so that the last of an epoch's 8 steps on two ranks has one micro-batch."""
    small, draw = tmp_path_factory.mktemp("poisoned") / "small.jsonl", random.Random(0)
    words = (ROOT / "LICENSE").read_text().split()
    texts = [" ".join(draw.choices(words, k=draw.choice([5, 20, 40, 80]))) for _ in range(40)]
    small.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    overrides = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    return [
        "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(overrides)}", "block_size=64",
        f"data_files={small}", "validation_fraction=0.1", "eval_strategy=no", "sample_steps=0", "logging_steps=1",
        "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "max_steps=60", "save_steps=40",
        "warmup_steps=3", "learning_rate=3e-3", "disable_tqdm=true",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def pushed(hub, launch, small_words, tmp_path_factory):
    """A run of one process that publishes itself on a bad day of the Hub; returns its directory and its process."""
    home = tmp_path_factory.mktemp("pushed")
    hub.tokens[SECRETS["HF_TOKEN"]] = ("user", "write")
    hub.fail("GET", "/whoami", status=429, Retry_After=1)
    hub.fail("POST", "/repos/create", status=504)
    hub.fail("POST", "/models/user/pushed/preupload/", status=503)
    hub.fail("POST", "/user/pushed.git/info/lfs/objects/batch")  # the connection drops
    hub.fail("PUT", "/lfs/", status=500)
    hub.fail("POST", "/models/user/pushed/commit/step10", after=True)  # it is made, and the answer is lost
    words = [*small_words, "deepspeed=null", "optim=adamw_torch", "max_steps=20", "save_steps=10", "sample_steps=20"]
    words += ["bf16=true"]  # on every machine: the published weights are held against it
    words += ["push_to_hub=true", "hub_model_id=user/pushed", "hub_license=apache-2.0", f"output_dir={home / 'out'}"]
    done = launch("python", "run_pretrain.py", *words, **SECRETS | hub.environment(home / "hf", SECRETS["HF_TOKEN"]))
    assert not [fault for fault in hub.faults if fault.times]
    return home / "out", done


@pytest.fixture(scope="session")
def poison(launch, small_words, tmp_path_factory):
    """Launch two ranks with a fault; returns the output directory, what each rank saw at each step, and the process."""

    def run(fault, *more, expect=0, **environment):
        where = tmp_path_factory.mktemp("poisoned")
        fault = json.dumps({"witness": str(where)} | fault)
        done = launch("deepspeed", "--num_gpus", "2", "tests/poisoned_run.py", f"fault={fault}", *small_words, *more,
                      f"output_dir={where / 'out'}", OMP_NUM_THREADS="1", expect=expect, **environment)  # fmt: skip
        notes = [(where / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
        seen = [[json.loads(line) for line in part] for part in notes]
        return where / "out", seen, done

    return run


@pytest.fixture(scope="session")
def skipping(poison):
    """Row 5 makes its micro-batch's loss NaN, row 9, from step 46 on, ten times itself; both are skipped."""
    return poison({"nan_row": 5, "spike_row": 9}, "on_spike=skip", "max_bad_steps=9", **SECRETS)


@pytest.fixture(scope="session")
def reported(launch, corpus_file, tmp_path_factory):
    """A run on two ranks that two trackers listen to, with held-out loss, samples and its report: 12 steps."""
    from test_run import TINY

    where = tmp_path_factory.mktemp("reported")
    words = [word for word in TINY if not word.startswith(("eval_strategy", "sample_steps"))]
    launch("deepspeed", "--num_gpus", "2", "run_pretrain.py", *words, f"data_files={corpus_file}",
           f"output_dir={where / 'run'}", "per_device_train_batch_size=2", "max_steps=12", "save_strategy=no",
           "eval_steps=6", "sample_steps=6", 'report_to=["trackio", "tensorboard"]', "project=smol", "run_name=first",
           OMP_NUM_THREADS="1", TRACKIO_DIR=str(where / "trackio"), HF_HOME=str(where / "hf"))  # fmt: skip
    return where / "run"


@pytest.fixture(scope="session")
def compared_run(reported, tmp_path_factory):
    """That run elsewhere, compared with its random twin on its held-out text, with a benchmark beside its report."""
    from smolpretrain.eval import compare, report

    copy = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(reported, copy)
    where = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    where.write_text("The cell makes\nOnce <b>more</b> | `x`\n")
    compare.main([f"random_init:{copy}", str(copy), "--prepared_dir", str(copy / "prepared"), "--prompts", str(where),
                  "--window", "32", "--max_new_tokens", "8", "--rounds", "0", "--samples", "2", "--seed", "3",
                  "--output_dir", str(copy / "report")])  # fmt: skip
    scores = [
        {"task": "ours", "metric": "acc", "value": value, "stderr": 0.02, "chance": 0.25, "n": 600, "model": model,
         "settings": {"limit": None, "num_fewshot": 0, "kind": kind}, "file": "ours.json", "commit": "abc"}
        for model, kind, value in ((str(copy), "checkpoint", 0.41), (f"random:{copy}", "random_init", 0.24))
    ]  # fmt: skip
    (copy / "report" / "benchmark.json").write_text(json.dumps(scores))
    report.main([str(copy)])
    return copy
