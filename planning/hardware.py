"""What a device can do: dense bf16 peak, memory, bandwidth, links and power, each from the vendor's data sheet.

Vendors print tensor-core peaks with 2:4 sparsity, which training does not use: the figures here are the dense half,
and for GeForce the one with fp32 accumulation, which is what training runs.
"""

import functools
import os
import time
from math import log
from typing import NamedTuple

from smolpretrain.core import precision


class Device(NamedTuple):
    """One device.

    Attributes:
        name: As the table calls it.
        peak_flops: Dense bf16 FLOPs a second with fp32 accumulation; None where unknown.
        memory_bytes: A data sheet's GB are taken as 1e9 bytes: some 6 % less than a card holds, which leaves room for
            CUDA's own context and for fragments.
        bandwidth: Bytes a second between memory and cores.
        link: Bytes a second to a neighbour in the same machine, one way: half of what data sheets print.
        watts: Board power; None where no data sheet says it.
        source: Where the figures stand.
    """

    name: str
    peak_flops: float | None
    memory_bytes: float
    bandwidth: float | None
    link: float | None
    watts: float | None
    source: str


def _device(name, tflops, memory_gb, bandwidth_gb, link_gb, watts, source):
    return Device(name, tflops * 1e12, memory_gb * 1e9, bandwidth_gb * 1e9, link_gb * 1e9, watts, source)


# Where each figure stands: the vendor's document. These were not to be had where the table was made; each figure was
# held against pages and public code that quote its document, last in November 2026.
_NVIDIA = "https://www.nvidia.com"
_SHEETS = f"{_NVIDIA}/content/dam/en-zz/Solutions/Data-Center"
_IMAGES = "https://images.nvidia.com/aem-dam/Solutions/geforce"
_L4 = f"NVIDIA L4 ({_NVIDIA}/en-us/data-center/l4): 242 with sparsity, 72 W; PCIe 4.0 x16"
_L40S = f"NVIDIA L40S data sheet ({_NVIDIA}/en-us/data-center/l40s): 362.05, 733 with sparsity; PCIe 4.0 x16"
# The A10's data sheet says 125, at full rate. The A10G accumulates in fp32 at half rate, as GeForce does: 80 SMs x 512
# FLOPs a clock x 1.71 GHz. Its power is the limit that nvidia-smi prints on AWS's G5.
_A10G = "A10G of AWS G5: 80 SMs at 1.71 GHz, the GA102 whitepaper's fp32-accumulate rate; nvidia-smi's limit; PCIe 4.0"
_A100 = f"NVIDIA A100 data sheet ({_SHEETS}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), SXM"
_HOPPER = "NVIDIA H100 whitepaper (https://resources.nvidia.com/en-us-tensor-core), SXM5: 1,978.9 with sparsity"
_H100_PCIE = f"NVIDIA H100 ({_NVIDIA}/en-us/data-center/h100): 1,513 with sparsity; brief PB-11133-001; PCIe 5.0 x16"
_H200 = f"NVIDIA H200 ({_NVIDIA}/en-us/data-center/h200): 1,979 with sparsity; NVLink 900 GB/s"
_B200 = "NVIDIA Blackwell brief, HGX B200 at 1,000 W: 2,250, 4,500 with sparsity; 180 of its 192 GB usable; NVLink 5"
_GA102 = f"NVIDIA GA102 whitepaper ({_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf)"
_ADA = f"NVIDIA Ada whitepaper ({_IMAGES}/ada/nvidia-ada-gpu-architecture.pdf), BF16 with FP32 accumulate; PCIe 4.0 x16"
_RTX50 = (
    f"NVIDIA RTX Blackwell whitepaper ({_IMAGES}/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf), BF16 with FP32 "
    "accumulate; PCIe 5.0 x16"
)
DEVICES = (
    _device("L4", 121, 24, 300, 32, 72, _L4),
    _device("L40S", 362.05, 48, 864, 32, 350, _L40S),
    _device("A10G", 70, 24, 600, 32, 300, _A10G),
    _device("A100-40GB", 312, 40, 1555, 300, 400, f"{_A100}: 624 with sparsity; NVLink 600 GB/s"),
    _device("A100-80GB", 312, 80, 2039, 300, 400, f"{_A100}: 624 with sparsity; NVLink 600 GB/s"),
    _device("H100-SXM", 989.4, 80, 3350, 450, 700, f"{_HOPPER}; NVLink 900 GB/s"),
    _device("H100-PCIe", 756.5, 80, 2000, 64, 350, _H100_PCIE),
    _device("H200", 989.4, 141, 4800, 450, 700, _H200),
    _device("B200", 2250, 180, 8000, 900, 1000, _B200),
    _device("RTX-3090", 71, 24, 936, 32, 350, f"{_GA102}, BF16 with FP32 accumulate; PCIe 4.0 x16"),
    _device("RTX-4090", 165.2, 24, 1008, 32, 450, _ADA),
    _device("RTX-5090", 209.5, 32, 1792, 64, 575, _RTX50),
)
NAMES = tuple(device.name for device in DEVICES)
# What CUDA calls them: the first whose words all stand in it.
_CUDA_NAMES = (
    ("H100 PCIe", "H100-PCIe"), ("H100", "H100-SXM"), ("H200", "H200"), ("B200", "B200"), ("A100 80GB", "A100-80GB"),
    ("A100 40GB", "A100-40GB"), ("A10G", "A10G"), ("L40S", "L40S"), ("L4", "L4"),
    ("RTX 3090", "RTX-3090"), ("RTX 4090", "RTX-4090"), ("RTX 5090", "RTX-5090"),
)  # fmt: skip
_OTHER_CARDS = {"Ti", "SUPER", "Laptop", "NVL", "D", "MIG"}  # of the same name, with other figures
# Model FLOPs utilization seen in published runs of the same card: lowest, taken by default, highest, where.
_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, 2,048 tokens"
_SMOLLM3 = "SmolLM3-3B on 384 H100: 0.29 (its training configuration, Hugging Face 2025)"
MFU = {
    "A100": (0.35, 0.50, 0.64, f"{_FOUNDRY}, MPT-125M to 7B: 0.44 to 0.64; TinyLlama-1.1B: 0.56; Pythia-1B: 0.35"),
    "H100": (0.29, 0.40, 0.46, f"{_FOUNDRY}, MPT-760M to 7B: 0.35 to 0.46; {_SMOLLM3}"),
    "H200": (0.29, 0.40, 0.46, "the H100's: the same cores"),
    "cpu": (0.09, 0.18, 0.28, "benchmarks/plan_time.py, 1M to 44M parameters on an Intel Xeon with AMX"),
    "": (0.29, 0.40, 0.64, "no published run on this card was found: between the H100's lowest and the A100's highest"),
}
# (device, whether under ZeRO): {weights: MFU of run_pretrain.py there}; 8-bit AdamW under ZeRO, torch's fused without.
# One device, rows of 2,048, 16 of them a micro-batch (1.7B: 8), no activation checkpointing; docs/gpu.md.
MEASURED = {
    ("H100-SXM", False): {134_515_008: 0.334, 361_821_120: 0.436, 1_711_376_384: 0.522},
    ("H100-SXM", True): {134_515_008: 0.216, 1_711_376_384: 0.426},
}
NEAR = 1.6  # times as many weights, or as few, that a measurement speaks for
SPREAD = 0.9, 1.05  # of it: runs beside others, and the best of bare loops


def find(name):
    """A device by the table's name, case and separators aside.

    Raises:
        ValueError: There is none of that name, or several could be meant.
    """
    wanted = name.lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-").removeprefix("geforce-")
    exact = [device for device in DEVICES if device.name.lower() == wanted]
    near = exact or [device for device in DEVICES if device.name.lower().replace("rtx-", "").startswith(wanted)]
    if len(near) != 1:
        choices = ", ".join(device.name for device in near) if near else f"{', '.join(NAMES)}, cpu"
        raise ValueError(f"gpu = {name} is {'not one device' if near else 'not known'}: choose from {choices}.")
    return near[0]


def from_cuda_name(name, memory_bytes=None):
    """The device that torch.cuda.get_device_name() names; its peak is None where the table does not have it."""
    words = set(name.replace("-", " ").split())
    for known_words, known in _CUDA_NAMES:
        if set(known_words.split()) <= words and not words & _OTHER_CARDS:
            device = find(known)
            return device._replace(memory_bytes=memory_bytes or device.memory_bytes)
    return Device(name, None, memory_bytes or 0.0, None, None, None, "not in the table")


def this_device(device):
    """The device of a torch.device: a GPU by its name, the CPU measured."""
    if device.type != "cuda":
        return measure_cpu()
    import torch

    return from_cuda_name(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)


def product_rate(seconds, clock=time.perf_counter):
    """FLOPs a second of a matrix product on this CPU, in bf16 where it has instructions for it, else in float32: the
    best of 1024 x 2048 x 2048 in so many seconds.
    """
    import torch

    dtype = torch.bfloat16 if precision.computes_bf16("cpu") else torch.float32
    left, right = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best, began = float("inf"), clock()
    while clock() - began < seconds or best == float("inf"):
        start = clock()
        left @ right
        best = min(best, clock() - start)
    return 2 * 1024 * 2048 * 2048 / best


@functools.cache  # the plan and the record of a run ask, 0.3 s each
def measure_cpu():
    """This machine's CPU: its matrix product measured with the threads torch was given, its memory as it says."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = "bf16" if precision.computes_bf16("cpu") else "float32"
    source = f"measured here: {kind} matrix product, {torch.get_num_threads()} threads"
    return Device("cpu", product_rate(0.3), float(memory), None, None, None, source)


def shared(device, ranks):
    """What each of a CPU's ranks has: its part of the memory and of the cores."""
    return device._replace(memory_bytes=device.memory_bytes / ranks, peak_flops=device.peak_flops / ranks)


def default_mfu(device):
    """(lowest, default, highest, source) of the utilization that published runs reached on such a device."""
    return next(value for prefix, value in MFU.items() if device.name.startswith(prefix))


def measured_mfu(device, weights, zero):
    """(lowest, taken, highest, source) of our own runs of such a model on one such device, or None."""
    runs = MEASURED.get((device.name, zero), {})
    near = min(runs, key=lambda size: abs(log(size / weights)), default=None)
    if near is None or abs(log(near / weights)) > log(NEAR):
        return None
    mfu = runs[near]
    source = (
        f"benchmarks/gpu.py on this device: {near / 1e6:,.0f}M weights reached {mfu:.2f}, its bare loop at most 5% more"
    )
    return mfu * SPREAD[0], mfu, mfu * SPREAD[1], source
