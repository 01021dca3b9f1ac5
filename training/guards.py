"""All ranks stop together: a signal to any of them, or a STOP file, ends the run at one step, checkpoint whole."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTED = os.EX_TEMPFAIL  # exit status 75: interrupted and resumable
_GO_ON, _SAVE, _STOP = 0, 1, 2


class StopTogether(TrainerCallback):
    """Turns what one rank has heard into what all ranks do, once a step.

    The deepspeed launcher signals its ranks one after another and gives each 30 seconds, so that a rank which saves
    alone waits for the others until it is killed; only an agreement at the end of a step is safe. Files in output_dir:
    STOP saves and stops, SAVE saves and goes on; both are removed when heard.
    """

    def __init__(self, output_dir):
        self.directory, self.heard, self.stopped = Path(output_dir), None, False
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number, frame):
        self.heard = self.heard or signal.Signals(number).name  # a second signal changes nothing

    def _wish(self, first):
        if self.heard:
            return _STOP
        for name, wish in (("STOP", _STOP), ("SAVE", _SAVE)):
            if first and (self.directory / name).exists():
                (self.directory / name).unlink(missing_ok=True)
                return wish
        return _GO_ON

    def on_step_end(self, args, state, control, **kwargs):
        wish = torch.tensor(self._wish(state.is_world_process_zero), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        if wish.item() >= _SAVE:
            control.should_save = True
        if wish.item() == _STOP and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    def restore_signals(self):
        """After training: what ends the run now is the default again, and no saving is waited for."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
