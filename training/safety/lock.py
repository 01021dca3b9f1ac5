"""Two runs cannot share one output_dir."""

import atexit
import fcntl
import os
import socket
from pathlib import Path

from smolpretrain.core.files import NO_LOCKS

LOCK = "run.lock"


def take(output_dir):
    """Hold output_dir for this process until it ends.

    A POSIX record lock: the kernel gives it back when the process dies (NFS's lock manager when the machine does), and
    DataLoader workers do not inherit it, so a run killed by SIGKILL can be started again at once.

    Returns:
        A sentence on a run that held it and ended without a word, or on storage that has no locks, or None.

    Raises:
        ValueError: Another run is at work there.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    path = Path(output_dir, LOCK)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, closing it gives the lock back
    file.seek(0)
    who = file.read().strip()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return f"{path}: its storage has no locks: nothing keeps a second run away from output_dir; start only one."
        if not isinstance(error, BlockingIOError | PermissionError):
            raise
        raise ValueError(
            f"output_dir = {output_dir} is in use by another run ({who or 'just starting'}): wait until it ends, or "
            "name another output_dir."
        ) from None
    _write(file, f"pid {os.getpid()} host {socket.gethostname()}\n")
    atexit.register(_write, file, "")  # ended in order
    return f"{path} was left by a run that ended without a word ({who}): taken over." if who else None


def _write(file, text):
    file.truncate(0)
    file.write(text)
    file.flush()
