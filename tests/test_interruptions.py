"""Killed, signalled, failing, changed: real runs of two ranks, ZeRO-2, 8-bit AdamW, accumulation 2, across epochs.

Where the launcher matters it is `deepspeed`; elsewhere tests/faults.py forks ranks from a process that has imported
everything. Each fault leaves a line in a file when it happens, and each test counts them.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from conftest import BIN, ROOT
from ports import free_port
from safetensors.torch import load_file
from test_checkpoints import metadata  # noqa: F401, a fixture

from smolpretrain import launch as launcher
from smolpretrain.training.safety import checkpoints, lock

pytestmark = pytest.mark.slow

STEPS, SAVE, RATE, WARMUP = 18, 3, 3e-3, 3
SOAK_KILLS = int(os.environ.get("SOAK_KILLS", 20))  # of the test, not of the product
PLAIN = ["deepspeed=null", "optim=adamw_torch_fused", "per_device_train_batch_size=4"]


@pytest.fixture(scope="session")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="session")
def words(where):
    """43 rows to train on, so that neither ranks nor micro-batches fill an epoch, and 24 held out."""
    chosen, vocabulary = random.Random(8), (ROOT / "LICENSE").read_text().split()
    small = where / "small.jsonl"
    texts = (" ".join(chosen.choices(vocabulary, k=chosen.choice([20, 80, 200]))) for _ in range(24))
    small.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    overrides = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    return [
        "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(overrides)}", "block_size=64",
        f"data_files={small}", "validation_fraction=0.15", "eval_steps=4", "sample_steps=0", "logging_steps=1",
        "per_device_train_batch_size=2", "gradient_accumulation_steps=2", f"max_steps={STEPS}", f"save_steps={SAVE}",
        "save_total_limit=2", f"warmup_steps={WARMUP}", f"learning_rate={RATE}", "disable_tqdm=true",
        "per_device_eval_batch_size=2",
    ]  # fmt: skip


class Ranks:
    """Launches of ranks forked from tests/faults.py."""

    def __init__(self, where):
        self.where, self.fired = where, where / "fired.jsonl"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        answers, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "tests/faults.py", "serve", str(write)], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        self.answers = os.fdopen(answers)

    def start(self, output_dir, words, fault=None, **request):
        self.log = self.where / f"{output_dir.name}.log"
        self.mark = self.log.stat().st_size if self.log.exists() else 0
        request |= {"words": [*words, f"output_dir={output_dir}"], "log": str(self.log)}
        if fault:
            request["fault"] = {"rank": 0, "fired": str(self.fired)} | fault
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.answers.readline())

    def wait(self):
        return json.loads(self.answers.readline())

    def run(self, *args, **request):
        """The ranks' exit statuses, and what this launch printed."""
        self.start(*args, **request)
        return self.wait(), self.log.read_text()[self.mark :]

    def times_fired(self):
        return len(self.fired.read_text().splitlines()) if self.fired.exists() else 0


@pytest.fixture(scope="session")
def ranks(where):
    ranks = Ranks(where)
    yield ranks
    ranks.process.stdin.close()
    ranks.process.wait(600)


@pytest.fixture(autouse=True)
def nothing_outlives_its_test(where):
    """What a test that failed has left of its launches ends with it."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(where) in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()


def launch(output_dir, words, log, *before, script=("run_pretrain.py",)):
    """`deepspeed` as a user calls it, `before` before it, in a session of its own."""
    port = free_port()
    command = [*before, str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, *script]
    process = subprocess.Popen(
        [*command, *words, f"output_dir={output_dir}"],
        cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    process.port = port
    return process


def metrics(output_dir, *keys):
    path = output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {row["step"]: tuple(row[key] for key in keys) for row in rows if keys[0] in row}


def losses(output_dir):
    return metrics(output_dir, "loss", "learning_rate", "grad_norm")


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition(), f"not reached; exit status {process.poll()}"


@pytest.fixture(scope="session")
def left_alone(words, where):
    with open(where / "alone.log", "w") as log:
        process = launch(where / "alone", words, log)
        assert process.wait(600) == 0, (where / "alone.log").read_text()[-3000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{process.port}_*"))  # 66 MiB of memory each
    epochs = metrics(where / "alone", "epoch")
    assert max(epochs.values())[0] > 2  # the data order of later epochs is at stake too
    return where / "alone"


def assert_equal_runs(one, other, steps=STEPS):
    """Losses, rates, norms, held-out losses, the model, its score, and all state of the last checkpoint, bit by bit."""
    assert losses(one) == losses(other) and len(losses(one)) == steps
    assert metrics(one, "eval_loss", "eval_tokens") == metrics(other, "eval_loss", "eval_tokens")
    weights = [load_file(directory / "model.safetensors") for directory in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    results = [json.loads((directory / "run.json").read_text())["result"] for directory in (one, other)]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]
    assert results[0]["tokens_seen"] == results[1]["tokens_seen"]
    files = [checkpoints.verify(directory / f"checkpoint-{steps}")["files"] for directory in (one, other)]
    state = [name for name in files[0] if name.endswith((".safetensors", "optim_states.pt", "scheduler.pt", ".pth"))]
    assert len(state) == 6
    assert [name for name in state if files[0][name]["sha256"] != files[1][name]["sha256"]] == []


def assert_stopped_whole(output_dir, text):
    step, newest = checkpoints.by_step(output_dir)[0]
    assert checkpoints.verify(newest)["step"] == step
    assert f": checkpoint-{step} is whole, the same command goes on from it." in text
    return step


def test_killed_at_every_point_the_run_ends_bit_identical(left_alone, words, where, ranks):
    output_dir, kills = where / "killed", 0
    ranks.run(where / "counted", [*words, "max_steps=4"], {"point": "file", "at": 0, "do": "count"})
    files = ranks.times_fired() // 2  # of one save: it saves at step 3 and at its end
    assert files >= 10
    points = [("prepare", 1, 0), ("prepare", 2, 0), ("begin", 1, 1), ("substep", 2, 0)]
    points += [("file", at, 0) for at in range(1, files + 1)] + [("file", 1, 1), ("file", 2, 1)]
    points += [("prediction", 2, 0), ("rotation", 1, 0), ("rotation", 2, 0), ("rotation", 5, 0), ("end", 1, 0)]
    before = ranks.times_fired()
    for point, at, rank in points:
        kill = {"point": point, "at": at, "rank": rank, "do": "kill all"}
        statuses, text = ranks.run(output_dir, words, kill)
        assert statuses == [-signal.SIGKILL] * 2, (point, at, text[-2000:])
        kills += 1
    assert ranks.times_fired() - before == kills == len(points)
    statuses, text = ranks.run(output_dir, words)
    assert statuses == [0, 0] and f"going on from {output_dir}/checkpoint-{STEPS}" in text, text[-2000:]
    assert "was passed over: it was never finished" in ranks.log.read_text()
    assert_equal_runs(left_alone, output_dir)


def test_a_soak_of_kills_at_random_moments_ends_bit_identical(left_alone, words, where, ranks):
    moments, kills, rounds = random.Random(0), 0, 0
    began = time.monotonic()
    assert ranks.run(where / "soak0", words)[0] == [0, 0]
    whole = time.monotonic() - began
    while kills < SOAK_KILLS:
        rounds += 1
        output_dir, statuses = where / f"soak{rounds}", None
        while statuses != [0, 0]:
            trained = (output_dir / f"checkpoint-{STEPS}" / checkpoints.MANIFEST).exists()
            ranks.start(output_dir, words)
            if kills < SOAK_KILLS and not trained:  # or most kills would come after the last step
                killer = Killer(moments.uniform(0.1, whole * 0.9), ranks.pids[0])
                statuses = ranks.wait()
                killer.end()
            else:
                statuses = ranks.wait()
            assert set(statuses) <= {0, -signal.SIGKILL}, ranks.log.read_text()[-2000:]
            kills += -signal.SIGKILL in statuses
        assert_equal_runs(left_alone, output_dir)
    print(f"{kills} SIGKILLs at random moments over {rounds} runs, each bit-identical to one left alone")


class Killer:
    """SIGKILL to a process group after some seconds, from a process of its own."""

    def __init__(self, seconds, group):
        code = f"import os, time; time.sleep({seconds}); os.killpg({group}, 9)"
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def end(self):
        self.process.kill()
        self.process.wait()


def test_signals_at_every_point_stop_all_ranks_and_the_run_ends_bit_identical(left_alone, words, where, ranks):
    output_dir, lines = where / "signalled", [*words, "dataloader_num_workers=1"]
    before, steps = ranks.times_fired(), []
    for point, at, rank, signals in (
        ("prepare", 1, 0, "SIGTERM"),
        ("begin", 1, 1, "SIGTERM SIGUSR1 SIGINT"),  # a second changes nothing
        ("substep", 2, 1, "group SIGTERM"),  # as launchers do: ranks and their workers
        ("prediction", 2, 1, "SIGINT"),
        ("prediction", 1, 0, "SIGTERM"),  # in what the one before owed: no step is taken
        ("file", 4, 0, "SIGTERM"),
        ("end", 1, 0, "SIGTERM"),
    ):
        fault = {"point": point, "at": at, "rank": rank, "do": signals}
        statuses, text = ranks.run(output_dir, lines, fault)
        assert statuses == [75, 75], (point, text[-2000:])
        assert "Traceback" not in text
        if point not in ("prepare", "end"):
            steps.append(assert_stopped_whole(output_dir, text))
    assert ranks.times_fired() - before == 7
    begun, substep, evaluation, owed, save = steps
    assert begun < substep < evaluation == owed < save
    assert evaluation % 4 == 0 and save % SAVE == 0  # in the evaluation, and after the save, not a step later
    assert ranks.run(output_dir, words)[0] == [0, 0]
    assert_equal_runs(left_alone, output_dir)  # so the held-out loss that was cut short was made up
    assert len(metrics(output_dir, "eval_loss")) >= STEPS // 4


def processes_of(session):
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.info["cmdline"] or [])
        except (ProcessLookupError, psutil.Error):
            pass
    return found


def pid_of(session, *parts):
    found = [pid for pid, command in processes_of(session).items() if all(part in command for part in parts)]
    assert found, processes_of(session)
    return min(found)


def ended(session):
    """Wait until nothing of a launch's session is left."""
    end = time.monotonic() + 600
    while (left := processes_of(session)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def held(fired, **fault):
    """Words of a launch in which a rank stands still in the second step, until it knows that it is to stop."""
    fault = {"point": "substep", "at": 2, "do": "await stop", "fired": str(fired)} | fault
    return ("tests/faults.py", f"fault={json.dumps(fault)}")


def test_whoever_is_signalled_the_ranks_stop_whole(left_alone, words, where, ranks):
    """Our launcher with DataLoader workers, the bare runner, and DeepSpeed's launch.py, one after another."""
    output_dir, log_path = where / "whoever", where / "whoever.log"
    lines, fired = [*words, "dataloader_num_workers=2"], [where / f"whoever{number}" for number in range(3)]
    steps = []
    with open(log_path, "w") as log:
        process = launch(output_dir, lines, log, sys.executable, "launch.py", script=held(fired[0], do="await end"))
        wait_for(fired[0].exists, process)
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(600) == 75, log_path.read_text()[-3000:]
        steps.append(assert_stopped_whole(output_dir, log_path.read_text()))

        for number, target, expected in (
            (1, "bin/deepspeed", -signal.SIGTERM), (2, "deepspeed.launcher.launch", 1),
        ):  # fmt: skip
            process = launch(output_dir, lines, log, script=held(fired[number], do="await end"))
            wait_for(fired[number].exists, process)
            os.kill(pid_of(process.pid, target), signal.SIGTERM)
            assert process.wait(600) == expected, log_path.read_text()[-3000:]
            ended(process.pid)  # none is left to train on alone
            steps.append(assert_stopped_whole(output_dir, log_path.read_text()))
    assert steps == [2, 4, 6]
    assert "DataLoader worker" not in log_path.read_text()
    assert "stopped at step" in log_path.read_text() and "(the end of its launcher)" in log_path.read_text()
    assert ranks.run(output_dir, words)[0] == [0, 0]
    assert_equal_runs(left_alone, output_dir)


def test_a_loop_starts_again_after_kills_and_interruptions_and_ends_bit_identical(left_alone, words, where, ranks):
    """A SIGKILL and a SIGTERM of one rank, which the loop does not hear, do not end it; STOP does."""
    output_dir, log_path, fired = where / "loop", where / "loop.log", where / "loop.jsonl"
    with open(log_path, "w") as log:
        loop = (sys.executable, "launch.py", "--restarts", "3")
        process = launch(output_dir, words, log, *loop, script=held(fired, at=4, rank=1, first=2))
        for times, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            wait_for(lambda times=times: fired.exists() and fired.read_text().count("\n") == times, process)
            (child,) = psutil.Process(process.pid).children()
            (rank,) = (pid for pid in launcher.ranks(child.pid) if psutil.Process(pid).environ()["RANK"] == "1")
            os.kill(rank, number)
        wait_for(lambda: "starting again (2 left)" in log_path.read_text(), process)
        (output_dir / "STOP").touch()
        assert process.wait(600) == 75, log_path.read_text()[-3000:]
    again = re.findall(r"launch.py: status (\d+) after step (\d+), starting again \((\d) left\)", log_path.read_text())
    assert [(int(step), int(left)) for _, step, left in again] == [(3, 3), (7, 2)]
    assert again[0][0] not in ("0", "75") and again[1][0] == "75"
    assert 8 <= assert_stopped_whole(output_dir, log_path.read_text()) < STEPS
    assert ranks.run(output_dir, words)[0] == [0, 0]
    assert_equal_runs(left_alone, output_dir)


@pytest.mark.parametrize(
    ("started", "words", "status", "starts"),
    [
        ("deepspeed", ["learning_rate=fast"], 2, 1),  # a mistake: another start would meet it again
        ("torchrun", ["learning_rate=fast"], 1, 2),  # torchrun hides the 2: two starts that come to nothing
    ],
)
def test_a_loop_ends_where_another_start_would_end_the_same_way(where, started, words, status, starts):
    command = [sys.executable, "launch.py", "--restarts", "5", started, "--master_port", free_port()]
    command += ["run_pretrain.py", *words, f"output_dir={where / 'fruitless'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr[-3000:]
    assert done.stderr.count("run_pretrain.py: error: command line: learning_rate") == starts
    ended = "launch.py: ended with status 1: two starts in a row have not come past step 0."
    assert (ended in done.stderr) == (starts == 2)


def test_a_launcher_that_is_killed_ends_the_run_whole_under_ours(words, where):
    output_dir, log_path, fired = where / "launcherless", where / "launcherless.log", where / "launcherless.jsonl"
    with open(log_path, "w") as log:
        process = launch(output_dir, words, log, sys.executable, "launch.py", script=held(fired))
        wait_for(fired.exists, process)
        (child,) = psutil.Process(process.pid).children()
        os.kill(pid_of(child.pid, "deepspeed.launcher.launch"), signal.SIGKILL)
        assert process.wait(600) == 75, log_path.read_text()[-3000:]
    assert_stopped_whole(output_dir, log_path.read_text())


def test_a_launcher_that_is_killed_before_training_takes_its_ranks_along_under_ours(words, where):
    """The ranks prepare data then, and look after no launcher: ours has to tell them."""
    fired, log_path = where / "unprepared.jsonl", where / "unprepared.log"
    with open(log_path, "w") as log:
        script = held(fired, point="prepare", at=1, do="sleep 1000")
        process = launch(where / "unprepared", words, log, sys.executable, "launch.py", script=script)
        wait_for(fired.exists, process)
        (child,) = psutil.Process(process.pid).children()
        os.kill(pid_of(child.pid, "deepspeed.launcher.launch"), signal.SIGKILL)
        assert process.wait(600) == 75, log_path.read_text()[-3000:]
    ended(child.pid)
    assert "nothing is lost, the same command goes on." in log_path.read_text()


def test_stop_and_save_files_are_heard(words, where, ranks):
    output_dir = where / "files"
    output_dir.mkdir()
    (output_dir / "SAVE").touch()
    statuses, _ = ranks.run(output_dir, [*words, "max_steps=2", "warmup_steps=1"])
    assert statuses == [0, 0] and checkpoints.verify(output_dir / "checkpoint-1") and not (output_dir / "SAVE").exists()
    output_dir = where / "stop"
    output_dir.mkdir()
    (output_dir / "STOP").touch()
    others_ended = {"point": "stopped", "at": 1, "do": "await signal"}  # launchers signal the first rank then
    statuses, text = ranks.run(output_dir, words, others_ended)
    assert statuses == [75, 75] and assert_stopped_whole(output_dir, text) == 1 and not (output_dir / "STOP").exists()
    assert launcher.asked_to_stop(output_dir)  # or a loop would start it again


def test_a_spot_notice_stops_the_run(words, where, ranks, metadata):  # noqa: F811
    output_dir = where / "spot"
    metadata.script = [200]
    pause = {"point": "substep", "at": 2, "do": "await stop"}
    statuses, text = ranks.run(output_dir, [*words, f"spot_notice_url={metadata.url}"], pause)
    assert statuses == [75, 75] and "(the cloud's notice that it takes this machine back)" in text, text[-2000:]
    assert metadata.polls[-1] == "a token" and assert_stopped_whole(output_dir, text) <= 3


def test_a_rank_that_raises_ends_the_run_and_its_error_is_shown_first_and_once(words, where):
    fired, log_path = where / "raised.jsonl", where / "raised.log"
    with open(log_path, "w") as log:
        process = launch(where / "raised", words, log, script=held(fired, at=4, rank=1, do="raise"))
        assert process.wait(600) == 1
    text = log_path.read_text()
    assert len(fired.read_text().splitlines()) == 1
    assert text.count("Traceback") == 1 == text.count("OutOfMemoryError: out of memory, as injected"), text[-3000:]
    assert "rank 1 failed at step 4:" in text and "closed by peer" not in text
    ended(process.pid)


@pytest.mark.parametrize("do", ["sleep 1000", "SIGKILL"])
def test_a_rank_that_hangs_or_is_killed_ends_the_run_and_is_named(left_alone, words, where, ranks, do):
    output_dir, before = where / do.split()[0], ranks.times_fired()
    fault = {"point": "substep", "at": 5, "rank": 1, "do": do}
    grace = {"grace": 2} if do.startswith("sleep") else {}
    statuses, text = ranks.run(output_dir, [*words, "ddp_timeout=20"], fault, **grace)
    assert ranks.times_fired() - before == 1
    assert statuses == [1, -signal.SIGKILL], text[-2000:]
    assert text.count("error: rank 0 at step 5: rank 1 does not answer: killed (out of memory?) or hanging.") == 1
    assert "Traceback" not in text
    assert checkpoints.verify(output_dir / "checkpoint-3")
    if do == "SIGKILL":
        assert ranks.run(output_dir, words)[0] == [0, 0]
        assert_equal_runs(left_alone, output_dir)


def test_a_first_rank_that_hangs_before_training_ends_the_run_too(left_alone, words, where, ranks):
    output_dir = where / "unchosen"
    shutil.copytree(left_alone, output_dir)
    fault = {"point": "choice", "at": 1, "rank": 0, "do": "sleep 1000"}
    statuses, text = ranks.run(output_dir, [*words, "ddp_timeout=5"], fault)
    assert statuses == [75, 1], text[-2000:]  # the one that hangs leaves when its launcher signals it
    assert (
        text.count("error: rank 1 outside training: rank 0 does not answer: killed (out of memory?) or hanging.") == 1
    )


def test_two_runs_cannot_share_an_output_dir(words, where, ranks):
    lock.take(where / "shared")
    statuses, text = ranks.run(where / "shared", words)
    assert statuses[0] == 2 and text.count("error:") == 1
    assert f"output_dir = {where / 'shared'} is in use by another run (pid {os.getpid()} host " in text


def test_a_finished_run_started_again_trains_nothing_and_ends_the_same(left_alone, words, where, ranks):
    again = where / "again"
    shutil.copytree(left_alone, again)
    statuses, text = ranks.run(again, words)
    assert statuses == [0, 0] and "First loss" not in text
    assert_equal_runs(left_alone, again)


def test_a_flipped_byte_in_the_newest_is_named_and_the_one_before_is_taken(left_alone, words, where, ranks):
    harmed = where / "harmed"
    shutil.copytree(left_alone, harmed)
    shard = next(harmed.glob(f"checkpoint-{STEPS}/global_step*/*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    statuses, text = ranks.run(harmed, words)
    assert statuses == [0, 0]
    assert f"{shard} is damaged: sha256" in text and f"going on from {harmed / f'checkpoint-{STEPS - SAVE}'}" in text
    assert_equal_runs(left_alone, harmed)


def test_no_whole_checkpoint_is_status_4_and_one_line(left_alone, words, where, ranks):
    broken = where / "broken"
    shutil.copytree(left_alone, broken)
    for path in broken.glob("checkpoint-*/latest"):
        path.write_text("")
    statuses, text = ranks.run(broken, words)
    assert statuses[0] == 4 and text.count("error:") == 1 and "Traceback" not in text
    assert "is whole:" in text and "latest is damaged: 0 bytes" in text


def test_another_learning_rate_is_refused_and_once_allowed_it_is_in_force(left_alone, words, where, ranks):
    changed = where / "changed"
    shutil.copytree(left_alone, changed)
    other = [*words, "learning_rate=1e-3", f"max_steps={STEPS + 4}"]
    statuses, text = ranks.run(changed, other)
    lines = [line for line in text.splitlines() if "error:" in line]
    assert statuses[0] == 2 and len(lines) == 1 and "trained with learning_rate = 0.003, now it is 0.001" in lines[0]
    statuses, text = ranks.run(changed, [*other, 'allow_changes=["learning_rate"]'])
    assert statuses == [0, 0]
    assert f"changed since {changed / f'checkpoint-{STEPS}'}: learning_rate 0.003 -> 0.001, max_steps 18 -> 22." in text
    rates = metrics(changed, "learning_rate")
    for step in range(STEPS + 1, STEPS + 5):
        share = (step - 1 - WARMUP) / (STEPS + 4 - WARMUP)
        assert rates[step][0] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * share)), rel=1e-9), step
    assert rates[STEPS] == metrics(left_alone, "learning_rate")[STEPS]


def test_under_zero_another_number_of_ranks_is_refused_before_anything_is_loaded(left_alone, words, where, ranks):
    output_dir = where / "fewer"
    shutil.copytree(left_alone, output_dir)
    statuses, text = ranks.run(output_dir, words, world=1)
    lines = [line for line in text.splitlines() if "error:" in line]
    assert statuses == [2] and len(lines) == 1 and "Traceback" not in text and "model:" not in text
    assert f"checkpoint-{STEPS} was trained with world_size = 2, now it is 1: set it back" in lines[0]
    assert f"init_from={output_dir / f'checkpoint-{STEPS}'} and another output_dir" in lines[0]


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_a_new_run_from_a_checkpoint_s_weights_says_so(left_alone, words, where, ranks, config):
    origin, fresh = left_alone / f"checkpoint-{STEPS}", where / f"from-{config}"
    lines = [*words, "max_steps=2", "warmup_steps=1", f"init_from={origin}", "seed=1"]
    statuses, text = ranks.run(fresh, [*lines, f"deepspeed=ds_configs/{config}.json"])
    assert statuses == [0, 0], text[-2000:]
    assert f"parameters from {origin}; sdpa" in text and "from random weights" not in text
    assert "as random weights should give" not in text and "not fresh random weights" not in text
    first, last = losses(fresh)[1][0], losses(left_alone)[STEPS][0]
    assert abs(first - last) < 0.5 < losses(left_alone)[1][0] - first
    assert json.loads((fresh / "run.json").read_text())["arguments"]["init_from"] == str(origin)


def test_what_resumed_runs_are_compared_in_is_8_bit_state_beside_32_bit_embeddings(left_alone):
    """So that assert_equal_runs compares the files of both kinds, of both ranks."""
    for rank in (0, 1):
        (shard,) = left_alone.glob(f"checkpoint-{STEPS}/global_step*/*_pp_rank_{rank}_*optim_states.pt")
        state = torch.load(shard, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
        held = [state[group]["__bnb_optimizer_quant_state__"] for group in sorted(state)]
        kinds = [{each[name].dtype for name in ("state1", "state2")} for each in held]
        assert kinds == [{torch.uint8}, {torch.float32}, {torch.float32}]  # of matrices, embeddings, norms


def torchrun(output_dir, words, *script):
    """Two ranks as a user without DeepSpeed launches them; (status, what they printed)."""
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port(), *script]
    done = subprocess.run([*command, *words, f"output_dir={output_dir}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def assert_same_state(one, other, steps):
    """As assert_equal_runs, of runs without DeepSpeed: every tensor of the optimizer's state by itself."""
    assert losses(one) == losses(other) and len(losses(one)) == steps
    ends = [directory / f"checkpoint-{steps}" for directory in (one, other)]
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    held = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    state = [{(at, key): torch.as_tensor(v) for at, of in each.items() for key, v in of.items()} for each in held]
    assert state[0].keys() == state[1].keys() and all(torch.equal(v, state[1][key]) for key, v in state[0].items())
    return {key for _, key in state[0]}


@pytest.mark.parametrize(
    ("optim", "more", "keys"),
    [
        ("muon", [], {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}),
        ("schedule_free_adamw", ["lr_scheduler_type=constant"], {"z", "exp_avg_sq"}),
    ],
)
def test_two_ranks_of_an_optimizer_without_zero_resume_bit_identical(words, where, ranks, optim, more, keys):
    """Left alone as forked ranks; stopped by a signal to one rank in the middle of an epoch, then resumed."""
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    lines = [*words, "deepspeed=null", f"optim={optim}", "max_steps=9", *more]
    statuses, text = ranks.run(where / f"{optim}-alone", lines)
    assert statuses == [0, 0], text[-2000:]
    stopped, fired = where / f"{optim}-stopped", where / f"{optim}.jsonl"
    fault = {"point": "substep", "at": 5, "rank": 1, "do": "SIGTERM"}
    if optim == "muon":
        status, text = torchrun(stopped, lines, *held(fired, **fault))
        assert status == 1 and len(fired.read_text().splitlines()) == 1, text[-3000:]  # torchrun hides the 75
        at = assert_stopped_whole(stopped, text)
        status, text = torchrun(stopped, lines, "run_pretrain.py")
        assert status == 0, text[-3000:]
    else:
        assert ranks.run(stopped, lines, fault)[0] == [75, 75]
        at = assert_stopped_whole(stopped, ranks.log.read_text())
        statuses, text = ranks.run(stopped, lines)
        assert statuses == [0, 0], text[-2000:]
    assert at == 5 and f"going on from {stopped}/checkpoint-5" in text
    assert assert_same_state(where / f"{optim}-alone", stopped, 9) >= keys
    results = [
        json.loads((where / f"{optim}-{how}" / "run.json").read_text())["result"] for how in ("alone", "stopped")
    ]
    assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]


def test_muon_under_zero_is_refused_by_two_ranks_in_one_line(words, where, ranks):
    statuses, text = ranks.run(where / "muon-zero2", [*words, "optim=muon"])
    assert statuses[0] == 2 and text.count("error:") == 1 and "Traceback" not in text
    assert "optim = muon works on whole tensors" in text and "set deepspeed=null" in text


def rows_by_step(directory):
    """{step: rows' hashes, sorted, over all ranks}."""
    rows = {}
    for file in sorted(directory.glob("rows-*.jsonl")):
        for line in file.read_text().splitlines():
            step, digest = json.loads(line)
            rows.setdefault(step, []).append(digest)
    return {step: sorted(digests) for step, digests in rows.items()}


@pytest.fixture(scope="module")
def ddp(words, where, ranks):
    """A run of two ranks without DeepSpeed that notes each row in rows-alone."""
    (where / "rows-alone").mkdir()
    statuses, text = ranks.run(where / "ddp", [*words, *PLAIN], rows=str(where / "rows-alone"))
    assert statuses == [0, 0], text[-2000:]
    return where / "ddp"


def test_ddp_on_fewer_ranks_keeps_the_global_batch_row_by_row(ddp, words, where, ranks):
    moved = where / "moved"
    plain = [*words, *PLAIN]
    (where / "rows-moved").mkdir()
    stop = {"point": "substep", "at": 5, "do": "SIGTERM"}  # in the middle of an epoch
    assert ranks.run(moved, plain, stop, rows=str(where / "rows-moved"))[0] == [75, 75]
    statuses, text = ranks.run(moved, plain, world=1, rows=str(where / "rows-moved"))
    assert statuses == [0], text[-2000:]
    assert "ranks 2 -> 1, gradient_accumulation_steps 2 -> 4." in text
    taken = rows_by_step(where / "rows-alone")
    assert taken == rows_by_step(where / "rows-moved") and len(taken) == STEPS
    for step, (loss, rate, _) in losses(ddp).items():
        assert losses(moved)[step][1] == rate
        assert losses(moved)[step][0] == pytest.approx(loss, abs=2e-2)


def test_an_epoch_repeats_no_row_and_says_what_it_leaves_out(ddp, where):
    taken = rows_by_step(where / "rows-alone")
    blocks = json.loads((ddp / "run.json").read_text())["data"]["splits"]["train"]["blocks"]
    together, a_step = 2 * 4, 2 * 2 * 4
    used = blocks // together * together
    assert used != blocks  # uneven, or this shows nothing
    assert f"data: each epoch leaves out {blocks - used} of its {blocks:,} rows" in (where / "ddp.log").read_text()
    steps = math.ceil(used / a_step)
    for epoch in range(STEPS // steps):
        rows = Counter(row for step in range(epoch * steps + 1, (epoch + 1) * steps + 1) for row in taken[step])
        assert rows.total() == used and max(rows.values()) == 1
