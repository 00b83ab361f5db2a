"""Adapters for programs that read weights from files: the merged weights, in a temporary directory."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from adpa.errors import ModelError, first_line
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import device_memory, release_memory

MORE_ROOM = "set TMPDIR to a directory with room for them"

logger = logging.getLogger(__name__)


@contextmanager
def merged_weights(checkpoint: Checkpoint, dtype: str) -> Iterator[Checkpoint]:
    """The same model with whole weights on disk: the checkpoint itself, or an adapter merged into its base in a dtype.

    The merged weights are removed at the end of the context.

    Raises:
        ModelError: the adapter cannot be merged, or there is no room for the merged weights.
    """
    if checkpoint.adapter is None:
        yield checkpoint
        return
    _check_room(checkpoint, dtype)
    with tempfile.TemporaryDirectory(prefix="adpa-merged-") as folder:
        _write(checkpoint, dtype, folder)
        yield replace(checkpoint, directory=Path(folder), adapter=None)


def _check_room(checkpoint: Checkpoint, dtype: str) -> None:
    checkpoint.check_memory(dtype, device_memory(torch.device("cpu")), "merge it on a machine with more memory")
    place = tempfile.gettempdir()
    needed, free = checkpoint.weight_bytes(dtype), shutil.disk_usage(place).free
    if needed > free:
        raise ModelError(
            f"{checkpoint.name}: its merged weights take about {needed / 1e9:.1f} GB in {dtype}; {place} has "
            f"{free / 1e9:.1f} GB free",
            MORE_ROOM,
        )


def _write(checkpoint: Checkpoint, dtype: str, folder: str) -> None:
    model = checkpoint.load(dtype, torch.device("cpu"))
    size = model.num_parameters() * model.dtype.itemsize / 1e9
    logger.warning("%s: its merged weights take %.1f GB in %s", checkpoint.name, size, folder)
    try:
        model.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        line = first_line(error)
        problem = f"{checkpoint.name}: its merged weights, {size:.1f} GB, cannot be written: {line}"
        raise ModelError(problem, MORE_ROOM) from error
    del model
    release_memory()
