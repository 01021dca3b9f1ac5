"""What run_pretrain.py asks before its first step."""

from . import counting, hardware


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
