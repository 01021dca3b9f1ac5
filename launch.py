"""Launch a run so that a signal stops it with a whole checkpoint: the launcher's own command, with this before it.

    python launch.py deepspeed --num_gpus 2 run_pretrain.py args.json
    smolpretrain-launch torchrun --nproc_per_node 2 run_pretrain.py args.json

Schedulers, containers and Ctrl-C signal the command they started. `deepspeed` dies of it and leaves its ranks running;
its launch.py ends them with status 1 (DeepSpeed 0.19.8). Here the launcher never hears the signal: the ranks do, which
agree on a step, save and end with status 75, and the launcher passes that on. A launcher that dies by itself takes no
rank along either: they are asked to stop, and waited for. Only SIGKILL of this command cannot be heard; the launcher
then gets a SIGTERM from the kernel (Linux), and the ranks notice its death.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = os.EX_TEMPFAIL  # 75, as the ranks say it
BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM, 256 - signal.SIGTERM)  # as subprocess, shells, DeepSpeed say it
PATIENCE_SECONDS = 60  # until a rank must have appeared: ssh to other machines has none here


def ranks(session):
    """The ranks of a launch: processes of its session with a LOCAL_RANK, without their children."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and "LOCAL_RANK" in process.environ():
                found[process.pid] = process.ppid()
    return {pid for pid, parent in found.items() if parent not in found}


def die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main(argv=None):
    """Run the launcher in a session of its own; the exit status is its ranks'."""
    command = list(sys.argv[1:] if argv is None else argv)
    if not command or Path(command[0]).name not in LAUNCHERS:
        print(f"usage: launch.py {'|'.join(LAUNCHERS)} [its own words] run_pretrain.py args.json", file=sys.stderr)
        return 2
    heard = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: heard.append(time.monotonic()))
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        child = subprocess.Popen(
            command, start_new_session=True, preexec_fn=die_with_parent, env=os.environ | {"PATH": path}
        )
    except OSError as error:
        print(f"launch.py: error: {command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
        return 2
    told, orphaned = set(), False
    while child.poll() is None or ranks(child.pid):
        if child.returncode is not None:
            orphaned = True
        if orphaned or heard:
            for pid in ranks(child.pid) - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told.add(pid)
            if not told and heard and time.monotonic() - heard[0] > PATIENCE_SECONDS:
                child.terminate()
        time.sleep(0.2)
    status = child.returncode
    if orphaned or (heard and status in BY_SIGTERM):
        return INTERRUPTED
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
