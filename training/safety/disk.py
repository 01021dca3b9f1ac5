"""Disk space: what the checkpoints of a run take, whether it is there, and how a full disk looks."""

import errno
import math
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from smolpretrain.core.architectures import checkpoint_bytes, size
from smolpretrain.core.status import NO_SPACE
from smolpretrain.core.text import one_line

from . import checkpoints

# A full disk in the words of the system, of safetensors (Rust), and of torch's zip writer, which drops the reason.
_FULL = re.compile(
    r"No space left|File too large|quota exceeded|os error (?:28|27|122)\b"
    r"|PytorchStreamWriter|unexpected pos|iostream error"
)
_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoSpace(OSError):
    """The disk is full, or would be."""

    status = NO_SPACE


def check_writable(output_dir):
    """Refuse a directory that cannot be made or written, before anything is spent.

    Raises:
        ValueError: Names it and the reason.
    """
    whole = Path(output_dir).absolute()
    if any((above / checkpoints.MANIFEST).exists() for above in (whole, *whole.parents)):
        raise ValueError(f"output_dir = {output_dir} is inside a prepared set or a checkpoint. Name another.")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir = {output_dir} cannot be written: {error.strerror}. Name another.") from None


def check_start(args, config, rows, say):
    """Refuse a run whose checkpoints would not fit beside what is there.

    Args:
        args: TrainingArguments.
        config: The architecture.
        rows: Of the training set.
        say: Called with a sentence where no checkpoint is written before the end.

    Returns:
        Bytes of a checkpoint.

    Raises:
        NoSpace: Names the keys and the bytes.
    """
    zero = args.hf_deepspeed_config.get_value("zero_optimization.stage") if args.deepspeed else 0
    one, exported = checkpoint_bytes(
        size(config), optim=str(getattr(args.optim, "value", args.optim)), bf16=args.bf16, zero_stage=zero
    )
    batches = rows // (args.per_device_train_batch_size * args.world_size)
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    strategy = str(args.save_strategy.value)
    every = {"no": math.inf, "epoch": an_epoch}.get(strategy, args.save_steps)
    every = every if every >= 1 else math.ceil(every * steps)
    count = 0 if strategy == "no" else math.ceil(steps / every)
    if args.save_total_limit is not None:  # and one more while it is written
        count = min(count, args.save_total_limit + 1 + (steps // args.keep_every_steps if args.keep_every_steps else 0))
    present = [file for _, path in checkpoints.by_step(args.output_dir) for file in path.rglob("*") if file.is_file()]
    needed, free = count * one + exported - sum(f.stat().st_size for f in present), free_bytes(args.output_dir)
    if needed > free:
        raise NoSpace(
            f"output_dir = {args.output_dir} needs {show(needed)} more for {count:,} checkpoints of {show(one)} at one "
            f"time (save_total_limit = {args.save_total_limit} and one being written, keep_every_steps = "
            f"{args.keep_every_steps}) and the model; its disk has {show(free)}, {show(needed - free)} are missing. "
            "Name another output_dir, lower save_total_limit, or raise save_steps or keep_every_steps."
        )
    if steps <= every < math.inf:
        say(f"save_steps = {every:,}: no checkpoint is written before the last of the {steps:,} steps.")
    return one


def check_save(output_dir, one, device):
    """Before a save: is there room? All ranks call, and all raise where one of them sees too little.

    Args:
        one: Bytes of a checkpoint as reckoned; what the newest one takes is believed rather.

    Raises:
        NoSpace: On all ranks, nothing was written.
    """
    one = newest_bytes(output_dir) or one
    missing = torch.tensor(max(0, one - free_bytes(output_dir)), dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.all_reduce(missing, op=dist.ReduceOp.MAX)
    if missing.item():
        raise NoSpace(_sentence(output_dir, one, missing.item()))


def explain(error, output_dir, one):
    """The NoSpace that an error in a save stands for, or None where it is about something else."""
    causes = []
    while error is not None and len(causes) < 10:
        causes.append(error)
        error = error.__cause__ or error.__context__
    for cause in causes:
        if isinstance(cause, NoSpace):
            return cause
        if getattr(cause, "errno", None) in _ERRNO or _FULL.search(str(cause)):
            one = newest_bytes(output_dir) or one
            missing = max(0, one - free_bytes(output_dir))
            return NoSpace(_sentence(output_dir, one, missing, one_line(cause, 160)))
    return None


def _sentence(output_dir, one, missing, reason=None):
    finished = checkpoints.finished(output_dir)
    left = f"The last whole checkpoint is {finished[0]}." if finished else "There is no checkpoint yet."
    why = f"output_dir = {output_dir} has no room for a checkpoint{f' ({reason})' if reason else ''}"
    room = f"it takes {show(one)}" + (f", {show(missing)} are missing" if missing else "; is there a quota?")
    return f"{why}: {room}. {left} Make room, and the same command goes on."


def newest_bytes(output_dir):
    """What the newest whole checkpoint takes, 0 where there is none."""
    finished = checkpoints.finished(output_dir)
    files = checkpoints.read_manifest(finished[0])["files"].values() if finished else ()
    return sum(entry["bytes"] for entry in files)


def free_bytes(output_dir):
    """Bytes that this user may still write there."""
    path = Path(output_dir).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def show(count):
    """Bytes for people."""
    unit, size = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"
