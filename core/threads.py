"""How OpenMP's threads wait for one another, chosen before torch loads.

libgomp's threads spin at barriers, which is fastest where they have the cores to themselves and slowest where they do
not: a thread that spins keeps the one that it waits for off its core. smollm2-1m on two cores beside about ten busy
processes: 193 and 318 tokens/s as libgomp does it, 1,165 and 832 with a spin count of 1000; quiet 14,907 and 11,884.
So it is looked whether others are at work, and only then, and only where the user chose nothing, they spin less.
"""

import contextlib
import os
import sys
import time

import psutil

CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
SPINS = "1000"
LEAST_SECONDS = 0.1  # between two looks
BUSY_CORES = 0.25  # of others: a desktop's idle work is a tenth


def seconds_of_others(script: str) -> dict[int, float]:
    """Return {pid: CPU seconds} of the processes that do not belong to this run.

    Args:
        script: The file that is run. Launchers above it name it on their command lines, and what they started is ours.
    """
    me, top = psutil.Process(), psutil.Process()
    for above in me.parents():
        if _names(above, script):
            top = above
    ours = {me.pid, top.pid}
    with contextlib.suppress(psutil.Error):
        ours |= {child.pid for child in top.children(recursive=True)}
    found = {}
    for process in psutil.process_iter(["cpu_times"]):
        if process.pid not in ours and (times := process.info["cpu_times"]):
            found[process.pid] = times.user + times.system
    return found


def _names(process: psutil.Process, script: str) -> bool:
    try:
        return any(os.path.basename(word) == script for word in process.cmdline())
    except psutil.Error:
        return False


class Look:
    """Looks at the other processes when made, and again when asked.

    >>> look = Look()       # then whatever must be imported, torch aside
    >>> look.settle()       # a sentence where something was chosen
    """

    def __init__(self, environment=os.environ):
        self.environment = environment
        self.script = os.path.basename(sys.argv[0])
        self.given = any(name in environment for name in CHOSEN_BY_USER) or "torch" in sys.modules
        self.before = {} if self.given else seconds_of_others(self.script)
        self.began = time.monotonic()

    def busy_cores(self) -> float:
        """Return how many cores the others have kept busy since."""
        time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - self.began)))
        after, passed = seconds_of_others(self.script), time.monotonic() - self.began
        return sum(max(0.0, used - self.before[pid]) for pid, used in after.items() if pid in self.before) / passed

    def settle(self) -> str | None:
        """Have the threads spin less where others are at work; torch must not have been imported yet."""
        if self.given or (busy := self.busy_cores()) < BUSY_CORES:
            return None
        self.environment["GOMP_SPINCOUNT"] = SPINS
        return (
            f"threads: other processes keep {busy:.1f} of {os.cpu_count()} cores busy, so OpenMP's threads sleep "
            f"sooner at barriers (GOMP_SPINCOUNT={SPINS}; set it, or OMP_NUM_THREADS, to choose yourself)."
        )
