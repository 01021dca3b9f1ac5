"""What ranks owe one another outside collectives: to wait for the first, and to fail so that one error shows.

Both go through the launch's key-value store, never through a collective: that would wait for ranks that are gone.
"""

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from transformers import TrainerCallback

from smolpretrain.core import status, upstream
from smolpretrain.core.text import one_line

from .guards import SIGNALS

# Gloo's and NCCL's words for a rank that does not answer any more.
LOST = re.compile(r"closed by (?:the )?peer|reset by peer|Broken pipe|refused|timed out|timeout|remote process", re.I)
STORE_SECONDS = 10  # a store that answers does so in milliseconds
REFUSAL_SECONDS = 60  # between the first rank's refusal and another's lie seconds
MEETING_SECONDS = 1800  # the ranks of a launch meet within, or torch ends them (its default_pg_timeout)


def rank():
    """This process's number in its launch."""
    return int(os.environ.get("RANK", 0))


def say(sentence):
    """One line from the first rank."""
    if rank() == 0 and sentence:
        print(sentence, flush=True)


def fail(error, code=status.BAD_INPUT):
    """One line for all ranks, and the exit status on each."""
    refuse(rank(), int(os.environ.get("WORLD_SIZE", 1)), Refusal(one_line(error), code))


def wait_for_first(world_size, done):
    """The others wait for the first rank without a collective: those give up after ddp_timeout, tokenizing may not.

    Args:
        done: True on the first rank, which has finished; False on those that wait.

    Raises:
        ValueError: The first rank has ended.
    """
    if world_size == 1:
        return
    store = upstream.default_store()
    if done:
        store.set("prepared", "yes")
    try:
        while not store.check(["prepared"]):
            time.sleep(0.5)
    except dist.DistError:
        raise ValueError("the first rank has ended") from None


def cannot_meet(error):
    """A sentence for a port of the launch that is taken, or an address that nobody answers at."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"MASTER_ADDR:MASTER_PORT = {where}: the ranks cannot meet there ({str(error).splitlines()[0][:200]}). Name a "
        "port that is free: deepspeed --master_port, torchrun --master_port."
    )


def bound_waiting(seconds):
    """Every process group there is waits for a rank so long, and no longer.

    On a CPU Trainer does not pass ddp_timeout on (transformers 5.23), and DeepSpeed makes groups of its own with
    torch's default: a hanging rank then kept the others for half an hour.
    """
    if dist.is_initialized():
        upstream.bound_groups(seconds)


def forget_shared_buffer(rank):
    """Remove the name of this rank's shared buffer, which DeepSpeed leaves in memory when a run ends.

    It has 66 MiB a rank and a launch's port in its name, so that every port leaves others (DeepSpeed 0.19.8 on a CPU).
    Call it before DeepSpeed makes it, where a killed run has left one, and once all ranks have opened it: it then lives
    as long as they do. What is older than MEETING_SECONDS goes with it, whosever of this user it is: of a run that was
    killed before its first step, or in use and needing its name no more.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    mine = upstream.shared_buffer(os.getuid(), address, port, rank)
    for path in upstream.shared_buffers(os.getuid()):
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > MEETING_SECONDS
            if old or path.name == mine:
                path.unlink()


class Begun(TrainerCallback):
    """What waits until every group and buffer of the launch is there."""

    def on_train_begin(self, args, state, control, **kwargs):
        bound_waiting(args.ddp_timeout)
        if dist.is_initialized():
            dist.barrier()
        forget_shared_buffer(args.process_index)


@contextlib.contextmanager
def one_error(rank, world_size, where):
    """Let the rank that fails first show its error, and the others end without one.

    A rank that fails ends at once, past every destructor, which might wait for other ranks. Its launcher then ends the
    others: deepspeed and torchrun give them 30 seconds. One of those may be asked to stop before it notices that a rank
    was killed, as in a long step: it names that rank all the same, or nobody would.

    Args:
        where: Callable; the place of the story, as "at step 7".
    """
    try:
        yield
    except Exception as error:
        if world_size > 1:  # once another has ended the launcher signals this one, which might leave without its error
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        code = getattr(error, "status", None)  # of an error that is no mistake of the program's, as a full disk
        if world_size == 1 and code is None:
            raise
        lost = _is_lost(error)
        silent = _silent_ranks(rank, world_size) if lost else None
        first, told = fails_first(rank, world_size, error)
        if first:
            if code is not None:
                print(f"run_pretrain.py: error: {error}", file=sys.stderr)
            elif lost:
                short = one_line(error)[-160:]
                print(
                    f"run_pretrain.py: error: rank {rank} {where()}: {silent} does not answer: killed (out of "
                    f"memory?) or hanging. The same command goes on from the last whole checkpoint. ({short})",
                    file=sys.stderr,
                )
            else:
                print(f"rank {rank} failed {where()}:\n{traceback.format_exc()}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        if world_size == 1:
            sys.exit(code)
        os._exit(told or 1)  # the launcher passes on the status of whichever rank it finds ended


class Refusal(Exception):
    """A sentence for the user, with the exit status of all ranks."""

    def __init__(self, sentence, status):
        super().__init__(sentence)
        self.status = status


def refuse(rank, world_size, refusal):
    """End with a refusal's line and status: the first rank's, which meets what the others meet; they wait.

    A launcher would cut that line off, had another ended before it. One that has waited for a minute was refused alone,
    and says it.
    """
    if rank != 0:
        time.sleep(REFUSAL_SECONDS)
    first, told = fails_first(rank, world_size, refusal)  # a rank that now finds the first gone has no error to show
    if first or rank == 0:
        print(f"run_pretrain.py: error: {refusal}", file=sys.stderr, flush=True)
    sys.exit(refusal.status if rank == 0 else told)


def _silent_ranks(rank, world_size):
    """Which ranks have not noticed, as this one has, that one is missing: the missing one is among them."""
    try:
        upstream.default_store().set_timeout(timedelta(seconds=STORE_SECONDS))
        upstream.default_store().set(f"lost/{rank}", "")
        time.sleep(2)  # they notice within milliseconds of one another
        silent = [str(other) for other in range(world_size) if not upstream.default_store().check([f"lost/{other}"])]
        return f"rank {' or '.join(silent)}" if silent else "another rank"
    except (RuntimeError, ValueError):
        return "rank 0"  # the store was its own and has ended with it


def _told():
    """A file of one launch on one machine: its ranks share a parent, which may start them again (torchrun)."""
    parent, begun = os.getppid(), 0
    with contextlib.suppress(psutil.Error):
        begun = round(psutil.Process(parent).create_time())  # its pid may have been another launcher's
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return Path(tempfile.gettempdir(), f"smolpretrain-told-{parent}-{begun}-{os.environ.get('MASTER_PORT')}-{again}")


def fails_first(rank, world_size, error):
    """Whether no other rank has told an error yet, and the exit status of the one that has; asked again, the same.

    Ask before anything is undone that the other ranks work on: what they then run into must find this rank's told.
    """
    code = getattr(error, "status", None)
    if world_size == 1:
        return True, code
    mine = f"{rank} {code or 1}"
    try:
        upstream.default_store().set_timeout(timedelta(seconds=STORE_SECONDS))
        told = upstream.default_store().compare_set("failed", "", mine).decode()
        _tell_by_file(told, may=True)  # before this rank ends, and maybe the store with it
    except (RuntimeError, ValueError):  # the store has ended with the first rank, or is not there yet
        told = _tell_by_file(mine, may=not _is_lost(error) or rank == 1)
    return told == mine, int((told or "0 1").split()[1])


def _is_lost(error):
    """Whether an error is about another rank: one with a status is a sentence of this program's, whatever its words."""
    return getattr(error, "status", None) is None and LOST.search(str(error)) is not None


def _tell_by_file(mine, may):
    """What this machine's ranks have told: `mine`, where nothing was told and this one may."""
    told, draft = _told(), _told().with_name(f"smolpretrain-tells-{os.getpid()}")
    try:
        if may:
            draft.write_text(mine)
            with contextlib.suppress(FileExistsError):
                os.link(draft, told)  # there at once with what it says: the others may be reading
            draft.unlink()
        return told.read_text()
    except OSError:
        return mine if may else ""
