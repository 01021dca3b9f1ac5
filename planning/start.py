"""What run_pretrain.py asks before its first step."""

import json
import os
from pathlib import Path

from . import assemble, counting, hardware, report

MARGIN = 1.15  # on an H100 runs took up to 12 % more memory than their plans


def utilization_terms(config, block_size, device):
    """What turns tokens a second into model FLOPs utilization: tokens/s * flops_per_token / (ranks * peak_flops).

    Args:
        config: The model's config as a dict.
        device: The torch.device a rank trains on; a CPU's peak is measured, half a second.

    Returns:
        {"flops_per_token": of one training token, "peak_flops": a second and rank, "device": its name}; None for what
        is not known of this architecture or device.
    """
    found = hardware.this_device(device)
    known = config["model_type"] in counting.KNOWN
    return {
        "flops_per_token": counting.flops_per_token(config, block_size) if known else None,
        "peak_flops": found.peak_flops,
        "device": found.name,
    }


def plan(config, values, device, ranks, attention=None):
    """The plan of a run for the machine it is on.

    Args:
        config: The model's config as a dict.
        values: The run's arguments by name, JSON values.
        device: The torch.device of this rank.
        ranks: Ranks in all.
        attention: The implementation that was chosen, where values say auto.

    Returns:
        (lines to print, plan for run.json); without a plan, the one line says why.
    """
    values = values | {"attn_implementation": attention or values["attn_implementation"]}
    asked, local = values["deepspeed"], int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    deepspeed = json.loads(Path(asked).read_text(encoding="utf-8")) if isinstance(asked, str) else asked
    found = hardware.this_device(device)
    if found.name == "cpu":
        found = found._replace(memory_bytes=found.memory_bytes / local)  # the ranks of a machine share it
    try:
        made = assemble.make(config, values, found, ranks=ranks, nodes=ranks // local, deepspeed=deepspeed, local=True)
    except ValueError as error:
        return [f"plan: none: {error}"], None
    return report.lines(made), made


def settle_checkpointing(args, config, values, attention):
    """On CUDA, where nothing was said of activation checkpointing, leave it out if the plan fits without it.

    Args:
        args: The run's arguments; activation_checkpointing is set.
        config, values, attention: As of `plan`.

    Returns:
        The sentence that says so, or None.
    """
    if not (args.checkpointing_unsaid and args.device.type == "cuda"):
        return None
    kept = values | {"activation_checkpointing": False, "gradient_checkpointing": None}
    _, made = plan(config, kept, args.device, args.world_size, attention)
    memory = made["memory"] if made else {"device_bytes": None}
    if not memory["device_bytes"] or memory["total_bytes"] * MARGIN > memory["device_bytes"]:
        return None
    args.activation_checkpointing = False
    gib = memory["total_bytes"] / 2**30
    return (
        f"activation_checkpointing: off, {gib:.0f} GiB fit without it and nothing is computed twice; true turns it on."
    )
