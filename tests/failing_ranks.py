"""Two ranks with a real process group and no model, which fail in every way: python tests/failing_ranks.py DIRECTORY

Imports once, forks two ranks a case, and prints {case: [statuses, what both wrote]} as JSON.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from ports import free_port

import in_place  # noqa: F401
from smolpretrain.training.safety import disk, guards, ranks

WORLD = 2
SIGNALLED = "rank 0 raises and is signalled before it has shown that"
BEFORE_THEY_MEET = ("both raise before they have met", "rank 1 raises before rank 0 has begun, which raises too")


def fail(case, rank):
    """One rank's part of a case; the other is in a collective then, or fails as well."""
    if case == SIGNALLED:
        guards.leave_on_signal()
    if case == f"rank {rank} raises" or case == "both raise" or (case == SIGNALLED and rank == 0):
        raise KeyError(f"boom of {rank}")
    if case in ("both meet a full disk", f"rank {rank} meets a full disk"):
        raise disk.NoSpace("the disk is full.")
    if case == "rank 0 is asked to stop, rank 1 is killed":
        guards.StopTogether(".")
        os.kill(os.getpid(), signal.SIGTERM if rank == 0 else signal.SIGKILL)
    if case == f"rank {rank} is refused":
        ranks.refuse(rank, WORLD, ranks.Refusal("rows: the connection was refused.", 2))
    if case == f"rank {rank} is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "rank 1 hangs" and rank == 1:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def begin(rank, group):
    """What a training's begin does, each rank with a buffer of DeepSpeed's name; then the first waits for the other."""
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_"
    buffers = [Path("/dev/shm", f"{name}{number}") for number in range(WORLD)]
    buffers[rank].touch()
    dist.barrier()
    if rank == 1:
        time.sleep(0.5)  # and only now opens the first one's
        print(f"there: {buffers[0].exists()}", flush=True)
    ranks.Begun().on_train_begin(SimpleNamespace(ddp_timeout=5, process_index=rank), None, None)
    if rank == 0:
        try:
            dist.all_reduce(torch.zeros(1), group=group)
        except RuntimeError as error:
            print(f"left: {buffers[0].exists()}; in a group of its own: {error}", flush=True)


def rank_process(case, rank, port, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), os.dup2(1, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if case == "rank 1 raises before rank 0 has begun, which raises too" and rank == 0:
        while "boom of 1" not in log.read_text():
            time.sleep(0.01)

    def where():
        if case == SIGNALLED and rank == 0:  # by its launcher, which has found the other ended
            os.kill(os.getpid(), signal.SIGTERM)
        return "at step 7"

    with ranks.one_error(rank, WORLD, where):
        if case in BEFORE_THEY_MEET:
            raise KeyError(f"boom of {rank}")
        dist.init_process_group("gloo", timeout=timedelta(seconds=40))
        other = dist.new_group(timeout=timedelta(seconds=40))
        dist.barrier()
        left = Path(f"{log}.{rank}"), Path(f"{log}.{1 - rank}")
        left[0].touch()
        ranks.REFUSAL_SECONDS = 1
        while not left[1].exists():  # or a rank that fails would break the barrier of one still in it
            time.sleep(0.01)
        if case == "rank 1 hangs":
            begin(rank, other)
        fail(case, rank)


def run(case, log):
    """Fork the ranks of a case and wait for both; one that hangs is ended once the other has."""
    port = free_port()
    pids = []
    for rank in range(WORLD):
        if (pid := os.fork()) == 0:
            try:
                rank_process(case, rank, port, log)
            except SystemExit as left:
                os._exit(left.code)
            finally:
                os._exit(99)  # one_error ends a rank that fails
        pids.append(pid)
    statuses = {}
    while len(statuses) < WORLD:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if case == "rank 1 hangs" and pids[1] not in statuses:
            os.kill(pids[1], signal.SIGKILL)
    return [statuses[pid] for pid in pids], log.read_text()


if __name__ == "__main__":
    cases = ["both raise", *BEFORE_THEY_MEET, "both meet a full disk"]
    cases += [
        f"rank {rank} {what}"
        for what in ("raises", "meets a full disk", "is refused", "is killed")
        for rank in range(WORLD)
    ]
    cases += [SIGNALLED, "rank 0 is asked to stop, rank 1 is killed", "rank 1 hangs"]
    print(json.dumps({case: run(case, Path(sys.argv[1], case)) for case in cases}))
