"""The loop of launch.py --restarts, around a command that ends as a script says: when it starts again, when it ends.

What real runs do under it is in test_interruptions.py. And the launch lines of docs/launching.md for several machines.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import BIN, ROOT, free_port

from smolpretrain import launch
from smolpretrain.core import status as statuses

LOOP = "import sys; from smolpretrain import launch; launch.PAUSE_SECONDS = {}; sys.exit(launch.main(sys.argv[1:]))"


@pytest.fixture
def loop(tmp_path):
    """Start the loop around a launcher whose n-th start is the n-th of these shell lines; returns the process."""

    def start(*lines, restarts=5, pause=0):
        script, out = tmp_path / "torchrun", tmp_path / "out"
        (out / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (out / "checkpoint-1" / "manifest.json").touch()
        (tmp_path / "starts").unlink(missing_ok=True)
        cases = "\n".join(f"{n}) {line} ;;" for n, line in enumerate(lines, start=1))
        count = f"echo start >> {tmp_path}/starts; n=$(wc -l < {tmp_path}/starts)"
        script.write_text(f"#!/bin/bash\n{count}\ncd {out}\ncase $n in\n{cases}\nesac\n")
        script.chmod(0o755)
        command = [
            sys.executable,
            "-c",
            LOOP.format(pause),
            "--restarts",
            str(restarts),
            str(script),
            "run_pretrain.py",
        ]
        return subprocess.Popen(
            [*command, f"output_dir={out}"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


def ended(process, tmp_path):
    """(status, starts, what it said)."""
    said, _ = process.communicate(timeout=300)
    return process.returncode, len((tmp_path / "starts").read_text().splitlines()), said


def newer(step):
    return f"mkdir checkpoint-{step}; touch checkpoint-{step}/manifest.json"


@pytest.mark.parametrize("status", statuses.FINAL)
def test_what_another_start_would_meet_again_ends_it(loop, tmp_path, status):
    assert ended(loop(f"exit {status}"), tmp_path)[:2] == (status, 1)


def test_an_interruption_is_never_fruitless_and_every_start_is_counted(loop, tmp_path):
    status, starts, said = ended(loop("exit 75", "exit 75", "exit 75", "exit 0"), tmp_path)
    assert (status, starts) == (0, 4), said
    assert [line.split("(")[1] for line in said.splitlines()] == ["5 left).", "4 left).", "3 left)."]


def test_two_crashes_in_a_row_without_a_newer_checkpoint_end_it_and_with_one_they_do_not(loop, tmp_path):
    status, starts, said = ended(loop("exit 1", f"{newer(2)}; exit 1", "exit 1", "exit 9", "exit 0"), tmp_path)
    assert (status, starts) == (9, 4), said
    assert said.endswith("launch.py: ended with status 9: two starts in a row have not come past step 2.\n")


def test_the_last_restart_ends_it(loop, tmp_path):
    status, starts, said = ended(loop("exit 75", "exit 75", "exit 0", restarts=1), tmp_path)
    assert (status, starts) == (75, 2) and said.endswith("ended with status 75: no restart is left.\n")


@pytest.mark.parametrize("status", [75, 1])
def test_a_stop_that_the_ranks_heard_ends_it_and_an_older_one_does_not(loop, tmp_path, status):
    """The ranks remove the file at once, and may be done before anybody else has seen it; torchrun says 1."""
    stops = [{"last_stop": {"step": step, "by": by}} for step, by in ((1, "SIGTERM"), (2, statuses.BY_STOP_FILE))]
    wrote = [f"echo '{json.dumps(stop)}' > run.json; {newer(stop['last_stop']['step'] + 1)}" for stop in stops]
    assert ended(loop(*(f"{line}; exit {status}" for line in wrote), "exit 0"), tmp_path)[:2] == (status, 2)
    assert ended(loop("exit 75", "exit 0"), tmp_path)[:2] == (0, 2), "what stopped an earlier run stops no other"


def test_a_stop_file_that_nobody_has_heard_ends_it(loop, tmp_path):
    assert ended(loop("touch STOP; exit 1", "exit 0"), tmp_path)[:2] == (1, 1)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_it_ends_it_and_reaches_the_ranks(loop, tmp_path, sent):
    rank = f"LOCAL_RANK=0 {sys.executable} -c 'import sys, time; open(sys.argv[1], \"w\"); time.sleep(600)' begun"
    process = loop(f"{rank}; exit 75", "exit 0")
    while not (tmp_path / "out" / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, sent)
    status, starts, said = ended(process, tmp_path)
    assert (status, starts) == (75, 1) and "starting again" not in said


def test_a_signal_between_two_starts_ends_it(loop, tmp_path):
    process = loop("exit 1", "exit 0", pause=600)
    assert "starting again" in process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, tmp_path)[:2] == (75, 1)


def test_a_launcher_in_an_environment_whose_path_has_a_space_is_started(tmp_path, monkeypatch):
    """pip writes the interpreter's path into the first line of deepspeed's script without quoting it."""
    here = tmp_path / "my models" / ".venv" / "bin"
    here.mkdir(parents=True)
    (here / "python").symlink_to(sys.executable)
    (here / "deepspeed").write_text(f"#!{here / 'python'}\nimport sys\nsys.exit(len(sys.argv))\n")
    (here / "deepspeed").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    assert launch.main(["deepspeed", "run_pretrain.py", "a", "b", "c", "d"]) == 6


MACHINES = {  # a line of docs/launching.md: what is smaller of it, the recipe aside, for machine n of 2
    "torchrun": {
        "--nnodes 8": "--nnodes 2",
        "--nproc_per_node 8": "--nproc_per_node 1",
        "worker-1:": "127.0.0.1:",
        "29500": "{port}",
    },
    "deepspeed --hostfile hostfile --no_ssh": {
        "--hostfile hostfile": "--hostfile {hosts}",
        "--node_rank 0": "--node_rank {n}",
        "worker-1": "127.0.0.1 --master_port {port}",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", MACHINES)
def test_a_launch_line_of_several_machines_trains_one_run_with_a_rank_from_each(launcher, small_words, tmp_path):
    """Two launchers on loopback, each for a machine of one rank, that share a disk."""
    recipe, port = "configs/smollm2-135m.json", free_port()
    lines = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8").splitlines()
    (line,) = [each for each in lines if each.startswith(launcher) and each.endswith(recipe)]
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=1\nworker-2 slots=1\n")
    started = []
    for n in (0, 1):
        command = line.removesuffix(recipe)
        for old, new in MACHINES[launcher].items():
            assert command.count(old) == 1
            command = command.replace(old, new)
        command = command.format(n=n, hosts=hosts, port=port)
        words = [*small_words, "max_steps=4", "validation_fraction=0", "save_steps=4", f"output_dir={tmp_path / 'out'}"]
        log = open(tmp_path / f"{n}.log", "w+")  # noqa: SIM115, the launcher's for its life
        words = [str(BIN / command.split()[0]), *command.split()[1:], *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment))
    statuses = [process.wait(900) for process in started]
    said = "".join((tmp_path / f"{n}.log").read_text() for n in (0, 1))
    assert statuses == [0, 0], said[-4000:]
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (run["plan"]["devices"]["ranks"], run["plan"]["devices"]["nodes"]) == (2, 2) and said.count("done: ") == 1
    assert len(list((tmp_path / "out" / "checkpoint-4").rglob("*optim_states.pt"))) == 2
