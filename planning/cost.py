"""Hours, money, energy and the network's share, from FLOPs and a device's data sheet."""

import math

from . import hardware

NETWORK = 100e9 / 8  # bytes a second and machine where nothing is said: 100 Gbit/s


def traffic(total_parameters, stage, accumulation, ranks):
    """Bytes a rank sends in a step.

    Gradients are reduced and parameters gathered once a step, 2 x 2 bytes a parameter; ZeRO-2 reduces after every
    forward and backward, and ZeRO-3 gathers for each forward and each backward as well. Source: Rajbhandari et al.
    2020 (arXiv 1910.02054), section 7.
    """
    if ranks == 1:
        return 0.0
    share, bf16 = (ranks - 1) / ranks, 2 * total_parameters
    if stage is None:
        return 2 * 2 * bf16 * share  # DDP reduces float32 gradients to all
    if stage == 3:
        return 3 * accumulation * bf16 * share
    return ((accumulation if stage == 2 else 1) + 1) * bf16 * share


def published_mfu(device, flops, checkpointing):
    """(lowest, default, highest, source) of the device's published runs, less what recomputing takes.

    Args:
        flops: counting.Flops of one token.
        checkpointing: Whether activations are computed again, which MFU does not count.
    """
    low, middle, high, source = hardware.default_mfu(device)
    if not checkpointing:
        return low, middle, high, source
    work = flops.model / (flops.model + flops.recompute)
    source += f"; times {work:.2f}, since recomputed activations are work that MFU leaves out"
    return low * work, middle * work, high * work, source


def estimate(flops, tokens_a_step, steps, device, ranks, utilization, *, nodes=1, sent=0.0, network=None):
    """How long a run takes at a fraction of the peak.

    Args:
        flops: counting.Flops of one token.
        device: hardware.Device.
        utilization: (lowest, taken, highest, source) of the model FLOPs utilization.
        sent: Bytes a rank sends in a step, see `traffic`.
        network: Bytes a second that a machine sends to others, None is NETWORK. All its ranks' rings pass it once,
            however many they are (NCCL's bus bandwidth: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    Returns:
        {mfu, mfu_range, mfu_source, hours, hours_range, gpu_hours, tokens_per_second, seconds_a_step,
        network_seconds_a_step, limited_by}; hours None where the steps are unknown, and the rates where the device's
        peak is.
    """
    low, mfu, high, source = utilization
    found = {"mfu": mfu, "mfu_range": [low, high], "mfu_source": source, "hours": None, "tokens_per_second": None}
    if not device.peak_flops:
        return found
    speed = device.link if nodes == 1 else min(network or NETWORK, device.link or math.inf)
    sending = sent / speed if speed and ranks > 1 else 0.0
    seconds = {
        fraction: max(tokens_a_step * flops.model / (ranks * device.peak_flops * fraction), sending)
        for fraction in (low, mfu, high)
    }
    found |= {
        "tokens_per_second": tokens_a_step / seconds[mfu],
        "seconds_a_step": seconds[mfu],
        "network_seconds_a_step": sending,
        "limited_by": "network" if seconds[mfu] == sending and sending else "compute",
    }
    if not steps:
        return found
    hours = {fraction: steps * value / 3600 for fraction, value in seconds.items()}
    return found | {
        "hours": hours[mfu],
        "hours_range": [hours[high], hours[low]],
        "gpu_hours": hours[mfu] * ranks,
    }


def money_and_energy(hours, ranks, device, price_per_gpu_hour=None):
    """{money, kilowatt_hours}: the price in whatever currency it was given, energy at full board power."""
    if hours is None:
        return {"money": None, "kilowatt_hours": None}
    return {
        "money": hours * ranks * price_per_gpu_hour if price_per_gpu_hour is not None else None,
        "kilowatt_hours": hours * ranks * device.watts / 1000 if device.watts else None,
    }
