"""Which values training's arguments may have, and what they ask of the machine."""

import json
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch
from accelerate.utils import DynamoBackend
from transformers import get_scheduler
from transformers.utils import is_liger_kernel_available

from smolpretrain.core.upstream import compile_modes
from smolpretrain.data.arguments import one_of

RANGES = {
    "above 0": (
        lambda v: v > 0,
        "learning_rate max_grad_norm adam_epsilon num_train_epochs save_steps eval_steps logging_steps "
        "neftune_noise_alpha",
    ),
    "above 0 and at most 1": (lambda v: 0 < v <= 1, "decay_fraction"),
    "at least 0": (
        lambda v: v >= 0,
        "weight_decay z_loss warmup_steps sample_steps loss_chunk_tokens keep_every_steps dataloader_num_workers",
    ),
    "at least 0 and below 1": (lambda v: 0 <= v < 1, "adam_beta1 adam_beta2 label_smoothing_factor"),
    "at least 0 and below 2^32": (lambda v: 0 <= v < 2**32, "seed data_seed"),
    "at least 1": (
        lambda v: v >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_eval_samples "
        "max_eval_documents max_bad_steps ddp_timeout",
    ),
}
_SILENT, _RESUME = "it would change the batch silently", "a checkpoint of it could not be resumed"
LEFT_ALONE = {  # arguments of transformers that must keep their default here, and why
    "average_tokens_across_devices": "without it ranks with fewer targets weigh too much",
    "save_only_model": _RESUME,
    "enable_jit_checkpoint": _RESUME,
    "ignore_data_skip": "a resumed run would see other rows",
    "restore_callback_states_from_checkpoint": "a resumed run restores its own state by itself",
    "logging_nan_inf_filter": "it shows a NaN loss as 0",
    "use_cache": "packed rows would attend across documents (transformers takes a cache for one document)",
    "fp16": "its loss scaling skips steps at will; set bf16=true, or bf16=false for float32",
    "fsdp": "deepspeed=ds_configs/zero3.json shares everything out over ranks",
    "parallelism_config": "ZeRO (deepspeed) is the parallelism there is",
    "accelerator_config": _SILENT,
    "auto_find_batch_size": _SILENT,
    "hub_revision": "main is the finished model, each checkpoint has a branch of its own",
    "hub_always_push": "every save is sent, one after another",
    "load_best_model_at_end": "the model of the last step is exported",
}
MUON = "muon"
NEED_NO_OPTIONS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")  # of schedules
COMPRESSIONS = ("none", "bf16", "fp16", "powersgd")
SCHEDULE = (  # what allow_changes can name
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "decay_fraction"),
)
PACKAGES = {  # optimizers of transformers by how their names begin: what they import, and what pip calls it
    **dict.fromkeys(("adamw_bnb", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"), ("bitsandbytes",) * 2),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao", "torchao")),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
}


def check(args):
    """Refuse what cannot be, before anything is built.

    Args:
        args: PretrainArguments, before TrainingArguments' own checks.

    Raises:
        ValueError: Begins with the key's name.
    """
    _check_packages(str(getattr(args.optim, "value", args.optim)))
    check_values(args)
    _check_environment(args)
    _check_compilation(args)


def check_values(args):
    """What holds on every machine: plan.py, which plans for others, asks this much of the same arguments.

    Raises:
        ValueError: Begins with the key's name.
    """
    _check_ranges(args)
    _check_choices(args)
    if args.z_loss and (args.loss_chunk_tokens == 0 or args.use_liger_kernel):
        what = "use_liger_kernel = true" if args.use_liger_kernel else "loss_chunk_tokens = 0"
        raise ValueError(f"z_loss = {args.z_loss} is part of the loss in chunks, {what} takes another: leave it out.")
    _check_decay(args)
    _check_optimizer(args)


def _check_ranges(args):
    for rule, (holds, names) in RANGES.items():
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value}.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps must be at least 1, or -1 to train num_train_epochs, got {args.max_steps}.")
    if args.max_steps > 0 and args.warmup_steps >= args.max_steps:
        raise ValueError(
            f"warmup_steps = {args.warmup_steps} is not below max_steps = {args.max_steps}: the learning rate "
            "would never reach its peak. Lower warmup_steps (below 1 it is a share of the run)."
        )
    if args.save_total_limit is not None and args.save_total_limit < 2:
        raise ValueError(
            f"save_total_limit must be at least 2, got {args.save_total_limit}: with 1, a crash while saving "
            "leaves no checkpoint at all."
        )


def _check_choices(args):
    for name, why in LEFT_ALONE.items():
        default = next(f.default for f in fields(args) if f.name == name)
        if getattr(args, name) != default:
            raise ValueError(f"{name} must be {json.dumps(default)}, got {json.dumps(getattr(args, name))}: {why}.")
    if not args.output_dir:
        raise ValueError("output_dir is empty: name the directory that everything goes to.")
    for name in args.allow_changes or []:
        one_of("allow_changes", name, SCHEDULE)
    one_of("gradient_compression", args.gradient_compression, COMPRESSIONS)
    if args.spot_notice_url not in (None, "aws") and urlsplit(args.spot_notice_url).scheme not in ("http", "https"):
        raise ValueError(f"spot_notice_url = {args.spot_notice_url} must be aws or begin with http:// or https://.")
    one_of("on_spike", args.on_spike, ("stop", "skip", "report"))
    one_of("train_sampling_strategy", args.train_sampling_strategy, ("random", "sequential"))
    one_of("save_strategy", str(getattr(args.save_strategy, "value", args.save_strategy)), ("no", "steps", "epoch"))
    one_of("hub_strategy", str(getattr(args.hub_strategy, "value", args.hub_strategy)), ("end", "every_save"))
    if args.push_to_hub and not args.hub_license:
        raise ValueError(
            "hub_license is not set: push_to_hub = true publishes the model under a licence that you choose, named as "
            "the Hub names it, as in hub_license=apache-2.0; it is never guessed."
        )
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint = {args.resume_from_checkpoint}: write resume={args.resume_from_checkpoint}; "
            "resume=auto, the default, finds the newest whole checkpoint by itself."
        )
    if args.hub_token is not None:
        raise ValueError("hub_token must not be in arguments: set HF_TOKEN or run `hf auth login`.")


def _check_environment(args):
    """Hold what is installed and what the launcher left in the environment against the arguments."""
    from transformers.integrations.integration_utils import (
        get_available_reporting_integrations,
    )  # 1 s: all models

    asked = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in set(asked) - {"none", "all", *get_available_reporting_integrations()}:
        raise ValueError(f"report_to = {name} needs {name}, which is not installed: pip install {name}.")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel = true needs liger-kernel, which is not installed: pip install liger-kernel."
        )
    if args.use_liger_kernel and not torch.accelerator.is_available():
        raise ValueError("use_liger_kernel = true needs a GPU, its kernels are Triton's: leave it out on a CPU.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise ValueError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is in the environment, but not RANK and LOCAL_RANK: launch "
            "with deepspeed, torchrun or accelerate, or unset WORLD_SIZE."
        )


def _check_decay(args):
    """decay_fraction belongs to one schedule, says its length alone, and leaves room for the warm-up."""
    share, options = args.decay_fraction, args.lr_scheduler_kwargs or {}
    stable = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "warmup_stable_decay"
    if share is None:
        if stable and "num_decay_steps" not in options:
            raise ValueError(
                "decay_fraction is not set: lr_scheduler_type = warmup_stable_decay asks how much of the run decays, "
                "as in decay_fraction=0.1 (SmolLM2: 0.1 to 0.2)."
            )
        return
    if not stable:
        raise ValueError(
            f"decay_fraction = {share} is of lr_scheduler_type=warmup_stable_decay, not of {args.lr_scheduler_type}."
        )
    for name in {"num_decay_steps", "num_stable_steps"} & options.keys():
        raise ValueError(f"decay_fraction = {share} and lr_scheduler_kwargs' {name} say the same: keep one.")
    warmup = args.warmup_steps
    if warmup >= 1 and args.max_steps < 1:
        raise ValueError(
            f"decay_fraction = {share} with warmup_steps = {warmup}: the run's steps are not known before its data "
            "is, so give warmup_steps as a share below 1, or set max_steps."
        )
    warmup_share = warmup / args.max_steps if warmup >= 1 else warmup
    if warmup_share + share > 1:
        raise ValueError(
            f"decay_fraction = {share} and warmup_steps = {warmup} ({warmup_share:g} of the run) are together more "
            "than the run: lower one of them."
        )


def _check_optimizer(args):
    _check_options(str(getattr(args.optim, "value", args.optim)), args)
    name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    if args.decay_fraction is not None:
        options = options | {"num_decay_steps": 1}  # in steps once these are known: training/schedule.py
    if str(getattr(name, "value", name)) in NEED_NO_OPTIONS and not options:
        return  # or torch's compiler would be imported for the optimizer below
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs = {json.dumps(options)} do not fit lr_scheduler_type = {name}: {error}."
        ) from None


def check_compression(args):
    """What can compress gradients here; the DeepSpeed file is known to be one.

    Raises:
        ValueError: The backend, ZeRO or another argument does not go with it.
    """
    kind, said = args.gradient_compression, f"gradient_compression = {args.gradient_compression}"
    if kind == "none":
        return
    if args.deepspeed:
        if kind == "powersgd":
            raise ValueError(f"{said} is DDP's, and ZeRO (deepspeed = {args.deepspeed}) is not: set deepspeed=null.")
        if kind == "fp16" and args.bf16:
            raise ValueError(f"{said} saves nothing: ZeRO sends bfloat16 where bf16 = true. Leave it out.")
        config = args.deepspeed if isinstance(args.deepspeed, dict) else json.loads(Path(args.deepspeed).read_text())
        if config.get("communication_data_type", kind) != kind:
            raise ValueError(
                f"{said}, but deepspeed = {args.deepspeed} has communication_data_type = "
                f"{config['communication_data_type']}. Leave one of them out."
            )
    elif kind in ("bf16", "powersgd") and args.use_cpu:
        why = "torch refuses its hook on gloo" if kind == "bf16" else "its chained reductions hang on gloo (torch 2.13)"
        raise ValueError(f"{said} needs NCCL, and CPUs have gloo: {why}. Take fp16, or ZeRO, which has bf16.")
    if kind == "powersgd" and args.on_spike == "skip":
        raise ValueError(f"{said} carries what it left out to the next step, so no step can be skipped: on_spike=stop.")


def _check_packages(optim):
    """What an optimizer imports is installed."""
    for begins, (module, package) in PACKAGES.items():
        if optim.startswith(begins) and find_spec(module) is None:
            raise ValueError(
                f"optim = {optim} needs {package}, which is not installed: pip install {package}, or set "
                "optim=adamw_torch_fused (32-bit state: 4 times that of adamw_bnb_8bit)."
            )


def _check_options(optim, args):
    """What an optimizer asks of the arguments beside it."""
    if optim == MUON:
        given = [word.split("=")[0] for word in (args.optim_args or "").replace(" ", "").split(",") if word]
        if unknown := set(given) - {"momentum", "ns_steps"}:
            raise ValueError(f"optim_args = {args.optim_args}: muon takes momentum and ns_steps, not {min(unknown)}.")
    whole = args.warmup_steps >= 1 or args.warmup_steps == 0  # a share would be taken for a number of steps: 0.01 is
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))  # a first step of 100 rates
    if optim.startswith("schedule_free") and (schedule != "constant" or not whole):
        raise ValueError(
            f"optim = {optim} warms up by itself and follows no schedule: set lr_scheduler_type=constant (now "
            f"{schedule}) and warmup_steps to a number of steps (now {args.warmup_steps})."
        )


def _check_compilation(args):
    """torch.compile's backend must be known to torch and to accelerate; both would say so after the model is built."""
    if args.torch_compile_backend is not None:
        known = {backend.value.lower() for backend in DynamoBackend} & {*torch.compiler.list_backends(exclude_tags=())}
        one_of("torch_compile_backend", args.torch_compile_backend, sorted(known))
    if args.torch_compile_mode is not None:
        one_of("torch_compile_mode", args.torch_compile_mode, compile_modes())
