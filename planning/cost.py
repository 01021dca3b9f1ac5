"""Hours, money, energy and the network's share, from FLOPs and a device's data sheet."""

import math
from typing import NamedTuple

from . import hardware

NETWORK = 100e9 / 8  # bytes a second and machine where nothing is said: 100 Gbit/s


class Traffic(NamedTuple):
    """Bytes a rank sends in a step.

    Attributes:
        behind: What may go while the rank computes: DDP's gradients, DeepSpeed's with overlap_comm on a GPU (it has no
            streams on a CPU), and the weights that ZeRO-3 fetches ahead.
        after: What the next step waits for.
    """

    behind: float = 0.0
    after: float = 0.0


def traffic(setup, total_parameters, ranks):
    """What rings send: (n - 1) / n of a tensor to reduce it or to gather it, twice as much to do both.

    DDP all-reduces gradients once a step. DeepSpeed's ZeRO-1 does once, ZeRO-2 after every micro-batch, and both gather
    the new weights after the step: 3 or more times the parameters, where the paper (arXiv 1910.02054, section 7) has 2,
    since 0.19.8 all-reduces unless use_multi_rank_bucket_allreduce is false. ZeRO-3 reduces for every micro-batch and
    gathers for its forward, and for its backward what lies further off than stage3_max_reuse_distance. On gloo reducing
    to the owner costs more: it sums in a ring and then collects, and its reduce-scatter is an all-reduce (torch 2.13).

    Args:
        setup: memory.Setup of the run; its ranks are not looked at.
    """
    if ranks == 1:
        return Traffic()
    tensor = total_parameters * (ranks - 1) / ranks
    gradients, weights = tensor * setup.gradient_bytes, tensor * (2 if setup.bf16 else 4)
    if setup.stage is None:
        return Traffic(behind=2 * gradients)
    if setup.stage == 3:
        again = max(0.0, 1 - setup.reuse / 2 / total_parameters)  # of the weights: a layer's backward is twice as far
        gathered = setup.accumulation * weights * (1 + again)
        reduced = setup.accumulation * gradients * (1 if setup.cuda else 2)
        if setup.cuda:
            return Traffic(gathered + reduced) if setup.overlap else Traffic(after=gathered + reduced)
        return Traffic(behind=gathered, after=reduced)
    to_owner = 1 if setup.cuda else 1 + 1 / ranks
    reduced = gradients * (2 if setup.all_reduce else to_owner) * (setup.accumulation if setup.stage == 2 else 1)
    if setup.cuda and setup.overlap:
        return Traffic(behind=reduced, after=weights)
    return Traffic(after=reduced + weights)


def known_mfu(device, flops, checkpointing, measured=None):
    """(lowest, default, highest, source) of runs on the device, less what recomputing takes.

    Args:
        flops: counting.Flops of one token.
        checkpointing: Whether activations are computed again, which MFU does not count.
        measured: Our own of such a model there, as hardware.measured_mfu gives it; None takes published ones.
    """
    low, middle, high, source = measured or hardware.default_mfu(device)
    if not checkpointing:
        return low, middle, high, source
    work = flops.model / (flops.model + flops.recompute)
    source += f"; times {work:.2f}, since recomputed activations are work that MFU leaves out"
    return low * work, middle * work, high * work, source


def estimate(flops, tokens_a_step, steps, device, ranks, utilization, *, nodes=1, sent=None, network=None):
    """How long a run takes at a fraction of the peak.

    Args:
        flops: counting.Flops of one token.
        device: hardware.Device.
        utilization: (lowest, taken, highest, source) of the model FLOPs utilization.
        sent: Traffic of a rank; what may hide behind the computing is taken to.
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
    behind, after = (part / speed if speed else 0.0 for part in sent or Traffic())
    computing = {
        fraction: tokens_a_step * flops.model / (ranks * device.peak_flops * fraction) for fraction in (low, mfu, high)
    }
    seconds = {fraction: max(each, behind) + after for fraction, each in computing.items()}
    found |= {
        "tokens_per_second": tokens_a_step / seconds[mfu],
        "seconds_a_step": seconds[mfu],
        "network_seconds_a_step": behind + after,
        "limited_by": "network" if behind + after > computing[mfu] else "compute",
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
