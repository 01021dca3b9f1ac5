"""Where a figure comes from: the commit of this code, the machine, the text it was measured on."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch


def code_commit():
    """This checkout's commit, -dirty where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def hardware(device):
    """The machine's name for a reader: a GPU's, or the CPU's with the threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def fingerprint(texts):
    """12 hex digits of sha256 over the texts, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update((text or "").encode() + b"\0")
    return digest.hexdigest()[:12]
