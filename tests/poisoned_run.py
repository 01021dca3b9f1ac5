"""run_pretrain.py with a fault inside, launched as a user launches it: `deepspeed tests/poisoned_run.py fault={...}`.

    nan_row, spike_row: the loss of each micro-batch that holds this row of the training set is NaN, or times 10, the
        latter from step spike_from on
    nan_from, gradient_from: from this step on, loss or gradient of `rank` are not finite
    weights_from: once this many steps are done, the embedding of `rank` is NaN
    limit_from: from this step on, `rank` (null: all) can write no file of more than `limit` bytes
    apart: at this step rank 0 saves once rank 1, which fails, has removed all, and that goes on once rank 0 has ended
    witness: a directory; each rank writes the rows it saw at every step and hashes of its weights and optimizer

Words after the fault are run_pretrain.py's own.
"""

import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
import in_place  # noqa: F401
from smolpretrain import run_pretrain

FAULT = {"rank": run_pretrain.RANK, "nan_row": None, "spike_row": None, "spike_from": 46, "witness": None}
FAULT |= {"nan_from": math.inf, "gradient_from": math.inf, "weights_from": math.inf, "limit_from": math.inf, "limit": 0}
FAULT |= {"apart": None}
make_trainer = run_pretrain.make_trainer


def digest(tensors):
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


class Witness(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []
        rows = [bytes(row.numpy().tobytes()) for row in map(torch.as_tensor, trainer.train_dataset["input_ids"])]
        assert len(set(rows)) == len(rows)
        self.number = {row: number for number, row in enumerate(rows)}
        trainer.model.register_forward_hook(self.after_forward, with_kwargs=True)
        next(trainer.model.parameters()).register_hook(self.on_gradient)

    def ill(self, what):
        return FAULT["rank"] in (None, run_pretrain.RANK) and self.trainer.state.global_step + 1 >= FAULT[what]

    def after_forward(self, model, args, kwargs, outputs):
        if not torch.is_grad_enabled():
            return
        rows = [self.number[bytes(row.numpy().tobytes())] for row in kwargs["input_ids"]]
        self.seen.append(rows)
        if FAULT["nan_row"] in rows or self.ill("nan_from"):
            outputs.loss = outputs.loss * math.nan
        if FAULT["spike_row"] in rows and self.trainer.state.global_step + 1 >= FAULT["spike_from"]:
            outputs.loss = outputs.loss * 10

    def on_gradient(self, gradient):
        return gradient * math.inf if self.ill("gradient_from") else gradient

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.ill("limit_from"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (FAULT["limit"], FAULT["limit"]))
        if self.ill("weights_from"):
            next(model.parameters()).data.mul_(math.nan)
        if FAULT["witness"] is None:
            return
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        moments = [v for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        line = {"step": state.global_step, "rows": self.seen, "loss": self.trainer.divergence.mean.item()}
        line |= {
            "weights": digest(getattr(p, "ds_tensor", p) for p in model.parameters()),
            "optimizer": digest([*masters, *moments]),
        }
        self.seen = []
        with open(Path(FAULT["witness"], f"rank{run_pretrain.RANK}.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


def keep_apart():
    """The widest gap there can be between two ranks in a save that fails on the second."""
    remove, save = shutil.rmtree, torch.save
    lives = os.open(Path(FAULT["witness"], "rank0.lives"), os.O_CREAT | os.O_RDWR)
    ill = f"global_step{FAULT['apart']}"

    def save_once_removed(content, path, **options):
        while ill in str(path) and Path(path).parent.exists():
            time.sleep(0.01)
        save(content, path, **options)

    def remove_and_wait(path, **options):
        remove(path, **options)
        if Path(path).name == f"checkpoint-{FAULT['apart']}":
            fcntl.flock(lives, fcntl.LOCK_SH)

    if run_pretrain.RANK == 0:
        fcntl.flock(lives, fcntl.LOCK_EX)
        torch.save = save_once_removed
    else:
        shutil.rmtree = remove_and_wait


def poisoned(*args):
    trainer, log = make_trainer(*args)
    trainer.add_callback(Witness(trainer))
    if FAULT["apart"]:
        keep_apart()
    return trainer, log


if __name__ == "__main__":
    run_pretrain.make_trainer = poisoned
    for word in [word for word in sys.argv if word.startswith("fault=")]:
        FAULT |= json.loads(word.removeprefix("fault="))
        sys.argv.remove(word)
    run_pretrain.main()
