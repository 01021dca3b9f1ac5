"""All ranks stop together: a signal to any of them, a STOP file or a launcher's death ends the run at one step."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from smolpretrain.core import status, upstream

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GO_ON, _SAVE, _STOP = 0, 1, 2


def leave_on_signal():
    """Outside training a signal ends the process at once with status 75: everything there is made again or is whole."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number, frame):
    for child in psutil.Process().children(recursive=True):  # processes that prepare would be waited for
        with contextlib.suppress(psutil.NoSuchProcess):  # Ctrl-C reaches all of them at once
            child.terminate()
    if os.environ.get("RANK", "0") == "0":
        os.write(1, f"{signal.Signals(number).name}: stopped, nothing is lost, the same command goes on.\n".encode())
    sys.exit(status.INTERRUPTED)


def launchers():
    """The pids above this rank that must live: its launcher's, and above DeepSpeed's launch.py the runner's.

    The runner dies of a SIGTERM without a word to launch.py, which would train on (DeepSpeed 0.19.8): its death shows
    as launch.py's new parent. Empty where no launcher started this process: a shell may end before its run.
    """
    parent = os.getppid()
    try:
        if upstream.DEEPSPEED_RANK_STARTER in psutil.Process(parent).cmdline():
            return (parent, psutil.Process(parent).ppid())
    except psutil.Error:
        return ()
    return (parent,) if "TORCHELASTIC_RUN_ID" in os.environ else ()


class StopTogether(TrainerCallback):
    """Turns what one rank has heard into what all ranks do, once a step.

    The deepspeed launcher signals its ranks one after another and gives each 30 seconds, so that a rank which saves
    alone waits for the others until it is killed; only an agreement at the end of a step is safe. Files in output_dir:
    STOP saves and stops, SAVE saves and goes on; both are removed when heard.

    Args:
        above: What `launchers` said when the process began.

    Attributes:
        heard: What asked this rank to stop, or None.
        stopped: All ranks agreed to stop, at the last step at the latest.
    """

    def __init__(self, output_dir, above=()):
        self.directory, self.above, self.heard, self.stopped = Path(output_dir), above, None, False
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self.hear(signal.Signals(number).name))

    def hear(self, why):
        """Ask for a stop at the end of the step; a second asking changes nothing."""
        self.heard = self.heard or why

    def _wish(self, first):
        if not self.heard and self.above and launchers() != self.above:
            self.hear("the end of its launcher")
        if self.heard:
            return _STOP
        for name, wish in ((status.STOP, _STOP), (status.SAVE, _SAVE)):
            if first and (self.directory / name).exists():
                (self.directory / name).unlink(missing_ok=True)
                if wish == _STOP:
                    self.hear(status.BY_STOP_FILE)
                return wish
        return _GO_ON

    def _agree(self, args, state, control):
        """All ranks call; the strongest wish of any is what all do. Returns it."""
        wish = torch.tensor(self._wish(state.is_world_process_zero), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        if wish.item() == _STOP:
            self.stopped = control.should_training_stop = True
        return wish.item()

    def on_step_end(self, args, state, control, **kwargs):
        if self._agree(args, state, control) >= _SAVE:
            control.should_save = True

    def on_prediction_step(self, args, state, control, **kwargs):
        """Between two held-out batches: what is left of them waits for the next start, the save does not."""
        wish = self._agree(args, state, control)
        control.should_save |= wish >= _SAVE
        control.should_evaluate &= wish < _STOP

    def on_save(self, args, state, control, **kwargs):
        """What was heard while saving needs no step more."""
        if not self.stopped:
            self._agree(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        """The last word: from here on a signal ends each rank at once."""
        if not self.stopped:
            self._agree(args, state, control)


def deafen_forks():
    """From here on whatever this process forks has the signals blocked from its birth.

    DeepSpeed's launch.py signals a rank's children too: a DataLoader worker between its start, at each epoch, and its
    first batch died of that, and took the checkpoint being written with it.
    """
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
    )


class Unheard:
    """A stream that may lose its reader: a run does not end because its terminal or the program after a pipe did."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, None where it was closed from the start

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self._silence()

    def _silence(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
