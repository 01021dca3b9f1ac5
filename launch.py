"""Launch a run so that a signal stops it with a whole checkpoint: the launcher's own command, with this before it.

    python launch.py deepspeed --num_gpus 2 run_pretrain.py args.json
    smolpretrain launch torchrun --nproc_per_node 2 run_pretrain.py args.json
    python launch.py --restarts 20 deepspeed run_pretrain.py args.json      start again after an interruption or a crash

Schedulers, containers and Ctrl-C signal the command they started. `deepspeed` dies of it and leaves its ranks running;
its launch.py ends them with status 1 (DeepSpeed 0.19.8). Here the launcher never hears the signal: the ranks do, which
agree on a step, save and end with status 75, and the launcher passes that on. A launcher that dies by itself takes no
rank along either: they are asked to stop, and waited for. Only SIGKILL of this command cannot be heard; the launcher
then gets a SIGTERM from the kernel (Linux), and the ranks notice its death.
"""

import contextlib
import ctypes
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parent / "in_place.py"))

from smolpretrain.core import status as statuses

LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
USAGE = f"usage: launch.py [restarts=N] {'|'.join(LAUNCHERS)} [its own words] run_pretrain.py args.json"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM, 256 - signal.SIGTERM)  # as subprocess, shells, DeepSpeed say it
DEFAULT_OUTPUT_DIR = "runs/pretrain"  # of arguments.py, which takes seconds to import
PAUSE_SECONDS = 5  # before another start: ports and GPUs of the last one are free again
PATIENCE_SECONDS = 60  # until a rank must have appeared: ssh to other machines has none here


def ranks(session):
    """The ranks of a launch, {pid: whether its launcher lives}: processes of its session with a LOCAL_RANK.

    Not their children, as long as the rank lives.
    """
    here, found = set(), {}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session:
                here.add(process.pid)
                if "LOCAL_RANK" in process.environ():
                    found[process.pid] = process.ppid()
    return {pid: parent in here for pid, parent in found.items() if parent not in found}


def die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def by_this_python(command):
    """The launcher's script beside this Python, run by it: a first line cannot name a Python whose path has a space.

    pip writes that path into deepspeed's as it is, and the kernel cuts it at the space.
    """
    script = Path(sys.executable).parent / Path(command[0]).name
    if command[0] != script.name or not script.is_file() or b"python" not in script.open("rb").readline():
        return command
    return [sys.executable, str(script), *command[1:]]


def run(command, heard):
    """Run the launcher in a session of its own; returns its ranks' exit status.

    Args:
        heard: Gets a time for each signal; then the ranks are told.
    """
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    child = subprocess.Popen(
        by_this_python(command), start_new_session=True, preexec_fn=die_with_parent, env=os.environ | {"PATH": path}
    )
    known, told, orphaned = set(), set(), False
    while child.poll() is None or known & ranks(child.pid).keys():
        if child.returncode is None:
            # What outlives its rank is none, as the workers of its DataLoader, which do by seconds.
            known |= {pid for pid, launched in ranks(child.pid).items() if launched}
        else:
            orphaned = True
        if orphaned or heard:
            for pid in known - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told.add(pid)
            if not told and heard and time.monotonic() - heard[0] > PATIENCE_SECONDS:
                child.terminate()
        time.sleep(0.2)
    status = child.returncode
    if orphaned or (heard and status in BY_SIGTERM):
        return statuses.INTERRUPTED
    return status if status >= 0 else 128 - status


def words_of_run(command):
    """What stands behind the script, the module (-m, --module) or the verb."""
    for place, word in enumerate(command):
        door = Path(word).name == "smolpretrain"
        if word.endswith(".py") or door or command[place - 1 : place] in (["-m"], ["--module"]):
            rest = command[place + 1 :]
            return rest[1:] if rest[:1] == ["train"] else rest
    return []


def output_dir(command):
    """Where the run keeps its checkpoints, from the words after the script; None where it will refuse them."""
    from smolpretrain.core.words import collect  # pydantic: not for a launch without --restarts

    try:
        given = collect(words_of_run(command))
    except ValueError:
        return None
    asked = given["output_dir"].value if "output_dir" in given else None
    return Path(str(asked or DEFAULT_OUTPUT_DIR)).expanduser()


def newest_step(directory):
    """Step of the newest finished checkpoint, 0 where there is none."""
    found = directory.glob("checkpoint-*/manifest.json") if directory else ()
    steps = (path.parent.name.removeprefix("checkpoint-") for path in found)
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def last_stop(directory):
    """What run.json says of the last stop, {step, by}; None where there was none."""
    try:
        return json.loads((directory / "run.json").read_text(encoding="utf-8")).get("last_stop")
    except (OSError, ValueError, TypeError):
        return None


def asked_to_stop(directory, before=None):
    """Whether a STOP file is there, or was heard by the ranks, which remove it, since `before` was the last stop."""
    now = last_stop(directory)
    heard = now != before and (now or {}).get("by") == statuses.BY_STOP_FILE
    return heard or bool(directory and (directory / statuses.STOP).exists())


def run_again(command, restarts, heard):
    """Run, and again after an interruption or a crash; returns the last exit status.

    It ends with a status of FINAL, a signal to this command, the run's STOP file, the last restart, or the second crash
    in a row that has left no newer checkpoint: a third would not either.
    """
    directory, fruitless = output_dir(command), 0
    reached = newest_step(directory)
    for left in range(restarts, -1, -1):
        stopped, status = last_stop(directory), run(command, heard)
        before, reached = reached, newest_step(directory)
        fruitless = 0 if status == statuses.INTERRUPTED or reached > before else fruitless + 1
        if status in statuses.FINAL or heard or asked_to_stop(directory, stopped):
            break
        if not left or fruitless == 2:
            why = "no restart is left" if not left else f"two starts in a row have not come past step {reached}"
            print(f"launch.py: ended with status {status}: {why}.", file=sys.stderr, flush=True)
            break
        print(f"launch.py: status {status} after step {reached}, starting again ({left} left).", flush=True)
        again = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < again and not heard:
            time.sleep(0.2)
        if heard:
            return statuses.INTERRUPTED
    return status


def main(argv=None):
    """Run the launcher; the exit status is its ranks'."""
    command, restarts = list(sys.argv[1:] if argv is None else argv), 0
    if command[:1] in (["--help"], ["-h"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if command[:1] == ["--version"]:
        print(f"smolpretrain {sys.modules['smolpretrain'].__version__}")
        return 0
    if command and (found := re.fullmatch(r"(?:--)?restarts=(\d+)", command[0])):
        restarts, command = int(found[1]), command[1:]
    elif command[:1] == ["--restarts"] and command[1:] and command[1].isdecimal():
        restarts, command = int(command[1]), command[2:]
    if not command or Path(command[0]).name not in LAUNCHERS:
        print(USAGE, file=sys.stderr)
        return statuses.BAD_INPUT
    heard = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: heard.append(time.monotonic()))
    try:
        return run_again(command, restarts, heard) if restarts else run(command, heard)
    except OSError as error:
        print(f"launch.py: error: {command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
        return statuses.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
