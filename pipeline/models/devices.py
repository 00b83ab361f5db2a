"""Devices and their memory."""

import gc
import os

import torch

from adpa.errors import ModelError, first_line


def resolve_device(device: str) -> torch.device:
    """The device to compute on; ``auto`` is a GPU if the machine has one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        line = first_line(error)
        raise ModelError(f"--device {device}: {line}", "use cpu, or a device that torch sees") from error


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device; for the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_memory() -> None:
    """Frees the memory of a deleted model. Models of transformers are in reference cycles, which delay this."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
