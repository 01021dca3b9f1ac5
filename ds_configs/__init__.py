"""DeepSpeed's JSON files: where one is, whether it agrees with the arguments, and what DeepSpeed needs to start."""

import contextlib
import json
import os
import shutil
import socket
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

from smolpretrain.core import upstream

HERE = Path(__file__).resolve().parent
# Optimizers that need more of a tensor than its elements: ZeRO gives them flat pieces, which some take without a word.
WHOLE_TENSORS = ("muon", "adafactor", "galore", "apollo", "lomo", "adalomo", "stable_adamw", "schedule_free")
LOCK_SECONDS = 10  # between the lock and the compiler lie milliseconds


def find(path):
    """The DeepSpeed JSON at `path`, relative to the working directory or to the installed package."""
    for candidate in (Path(path).expanduser(), HERE.parent / path):
        if candidate.is_file():
            return str(candidate)
    shipped = ", ".join(f"ds_configs/{p.name}" for p in sorted(HERE.glob("*.json")))
    raise ValueError(f"deepspeed = {path} is not a file. Shipped: {shipped}; null trains without DeepSpeed.")


def stand_alone():
    """The environment of a run of one process, where no launcher made one: DeepSpeed would ask MPI for it."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in alone.items()})


def say_if_unbuilt(remove_stale_lock):
    """Return a sentence where DeepSpeed's extension for CPUs is still to be built, else None.

    torch's builder waits for its lock for ever, also for one that a killed build has left (2.13): a lock older than
    LOCK_SECONDS that no process works behind is removed.

    Args:
        remove_stale_lock: True on one rank of a machine.
    """
    directory = upstream.extension_directory(upstream.DEEPSPEED_EXTENSION)
    lock = directory / "lock"
    while remove_stale_lock and lock.exists() and not _someone_works_in(directory):
        with contextlib.suppress(FileNotFoundError):
            if (age := time.time() - lock.stat().st_mtime) > LOCK_SECONDS:
                lock.unlink()
            else:
                time.sleep(max(0.0, LOCK_SECONDS - age) + 0.1)
    if (directory / f"{upstream.DEEPSPEED_EXTENSION}.so").exists():
        return None
    return "DeepSpeed builds its extension for CPUs now, once: about half a minute."


def _someone_works_in(directory):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == str(directory):
                return True
    return False


def _check_build(args):
    """On a CPU DeepSpeed builds an extension: with a compiler, Python's headers, and a directory to write to."""
    said = f"deepspeed = {args.deepspeed} builds a small extension on a CPU"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = (
        "a C++ compiler (g++)"
        if not shutil.which(os.environ.get("CXX", "c++"))
        else ("" if header.is_file() else f"Python's headers ({header})")
    )
    if missing:
        raise ValueError(
            f"{said}, and {missing} is missing: install it "
            "(Debian: apt-get install g++ python3-dev), or train without DeepSpeed: deepspeed=null."
        )
    upstream.link_where_paths_have_spaces()
    try:
        directory = upstream.extension_directory(upstream.DEEPSPEED_EXTENSION)
        with tempfile.TemporaryFile(dir=directory):  # built or not, torch's lock is a file there
            pass
    except OSError as error:
        raise ValueError(
            f"{said}, and {error.filename or directory} cannot be written ({error.strerror}): set "
            "TORCH_EXTENSIONS_DIR to a directory that can, or train without DeepSpeed: deepspeed=null."
        ) from None


def check(args, world=None):
    """Refuse what DeepSpeed or accelerate would silently replace (facts: 0.19.8, accelerate 1.15).

    Args:
        world: Ranks; None takes the launcher's.
    """
    if isinstance(args.deepspeed, str):
        try:
            config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"deepspeed = {args.deepspeed} is not JSON: {error}.") from None
    else:
        config = args.deepspeed
    wrong = [key for key in ("bf16", "zero_optimization") if not isinstance(config.get(key) or {}, dict)]
    if wrong:
        raise ValueError(f"deepspeed = {args.deepspeed}: {wrong[0]} must be an object, is {config[wrong[0]]!r}.")
    if (config.get("fp16") or {}).get("enabled"):
        raise ValueError(
            f"deepspeed = {args.deepspeed}: fp16 is not supported; take it out and set bf16=true or false."
        )
    if args.use_cpu:
        _check_build(args)
    for block, knob in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if block in config:
            raise ValueError(
                f"deepspeed = {args.deepspeed}: its {block!r} block would silently override {knob}. Take it out."
            )
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    shared = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", micro),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", accumulation),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
        "train_batch_size": ("micro-batch x accumulation x ranks", micro * accumulation * world),
    }
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"deepspeed = {args.deepspeed}: zero_optimization.stage = {zero.get('stage')}, but must be 1, 2 or 3; "
            "deepspeed=null trains without ZeRO."
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.startswith(WHOLE_TENSORS):
        raise ValueError(
            f"optim = {optim} works on whole tensors, and ZeRO (deepspeed = {args.deepspeed}) gives each rank flat "
            "pieces of them: set deepspeed=null, which trains with DDP on several ranks."
        )
    if not (config.get("bf16") or {}).get("check_grad_overflow", True):
        raise ValueError(
            f"deepspeed = {args.deepspeed}: bf16.check_grad_overflow = false would apply gradients that are not "
            "finite. Take it out."
        )
    if zero.get("stage") == 3 and args.z_loss:
        raise ValueError(
            f"z_loss = {args.z_loss} is part of the loss in chunks, and ZeRO-3 (deepspeed = {args.deepspeed}) shares "
            "the head out: take deepspeed=ds_configs/zero2.json."
        )
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"deepspeed = {args.deepspeed}: without stage3_gather_16bit_weights_on_model_save = true in "
            "zero_optimization no model could be written at the end. Add it."
        )
    if (enabled := (config.get("bf16") or {}).get("enabled", "auto")) not in ("auto", args.bf16):
        raise ValueError(f'deepspeed = {args.deepspeed}: bf16 = {enabled}, but bf16 = {args.bf16} here. Say "auto".')
    for key, (knob, value) in shared.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(f'deepspeed = {args.deepspeed}: {key} = {config[key]}, but {knob} = {value}. Say "auto".')
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload == "cpu" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"deepspeed = {args.deepspeed}: offload_optimizer would silently replace optim = {args.optim} by "
            'DeepSpeed\'s own. Write "zero_force_ds_cpu_optimizer": false.'
        )
