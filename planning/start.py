"""What run_pretrain.py asks before its first step."""

import json
import os
from pathlib import Path

from . import assemble, counting, hardware, report


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


def plan(config, values, device, ranks, attention):
    """The plan of a run for the machine it is on.

    Args:
        config: The model's config as a dict.
        values: The run's arguments by name, JSON values.
        device: The torch.device of this rank.
        ranks: Ranks in all.
        attention: The implementation that was chosen.

    Returns:
        (lines to print, plan for run.json); without a plan, the one line says why.
    """
    values = values | {"attn_implementation": attention}
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
