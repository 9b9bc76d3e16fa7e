"""The device that a benchmark runs on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor: as Linux has it, or else as Python has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
