"""The files of a checkpoint: which of them are loaded, their digests, and what is wrong with them. Imports no torch.

transformers and vLLM choose weight files by different rules. adpa takes only a directory from which both load the same
files, and digests these.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adpa.data.cache.kinds import did_you_mean_path, kind
from adpa.errors import ModelError

CONFIG = "config.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"
# transformers loads the first of these that is there: a file, or all files that an index names.
WEIGHTS = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")  # of the files that these names and indices mean
# vLLM finds the settings of a quantization in files with these ends if config.json has none.
QUANTIZATION_PATTERNS = ("*quantize_config.json", "*quant_config.json", "*quantization_config.json")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # files beside the weights that trainers write
KINDS_OF_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT loads the first that is there
LFS_POINTER = b"version https://git-lfs"


def check_whole(name: str, directory: Path) -> None:
    """Checks that a directory has a configuration and whole weights, as far as the beginnings of the files tell.

    Raises:
        ModelError: it has not, or an error of ``weight_files`` or ``check_weights``.
    """
    if not (directory / CONFIG).is_file():
        found = "" if kind(directory) in ("a directory", "a model") else f", but {kind(directory)}"
        place = Path(name) if os.path.isdir(name) else directory  # as the user wrote it
        below = [str(file.parent) for file in sorted(place.glob("*/config.json"))]
        meant = did_you_mean_path(place, "a model") or (f"did you mean {below[-1]}?" if below else "check the path")
        raise ModelError(f"{name}: found no config.json{found}; expected a Hugging Face checkpoint directory", meant)
    files = weight_files(name, directory)
    if not files:
        others = sorted(file.name for file in _glob(directory, "*") if file.suffix in KINDS_OF_WEIGHTS)
        found = f"; found {_some(others)}" if others else ""
        raise ModelError(f"{name}: found no weights; expected one of {', '.join(WEIGHTS)}{found}")
    check_weights(name, files)


def model_files(name: str, directory: Path) -> list[Path]:
    """Every file that is loaded: configuration, weights, settings of a quantization.

    Raises:
        ModelError: an error of ``weight_files``.
    """
    named = read_json(name, directory / CONFIG).get("configuration_files") or []
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise ModelError(f"{name}: found configuration_files {named!r} in its {CONFIG}; expected file names")
    beside = {file for pattern in QUANTIZATION_PATTERNS for file in _glob(directory, pattern)}
    beside |= {directory / each for each in named if each != CONFIG and (directory / each).is_file()}
    return [directory / CONFIG, *weight_files(name, directory), *sorted(beside)]


def is_quantized(name: str, directory: Path) -> bool:
    """Whether the configuration, or a file beside it, says that weights on disk are quantized: all of them, or some.

    Raises:
        ModelError: the configuration cannot be read.
    """
    config = read_json(name, directory / CONFIG)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # of a larger model
    said = any(part.get(key) is not None for part in parts for key in ("quantization_config", "compression_config"))
    return said or any(_glob(directory, pattern) for pattern in QUANTIZATION_PATTERNS)


def weight_files(name: str, directory: Path) -> list[Path]:
    """The files from which transformers and vLLM load the weights; an empty list if there are none.

    Raises:
        ModelError: the two would load different files, or a file that an index names is missing.
    """
    explicit = read_json(name, directory / CONFIG).get("transformers_weights")
    if explicit is not None and not isinstance(explicit, str):
        raise ModelError(f"{name}: found transformers_weights {explicit!r} in its {CONFIG}; expected a file name")
    first = next((directory / each for each in (explicit, *WEIGHTS) if each and (directory / each).is_file()), None)
    if first is None:
        return []
    chosen = _shards(name, first) if first.name.endswith(".index.json") else [first]
    if missing := [file.name for file in chosen if not file.is_file()]:
        raise ModelError(f"{name}: {first.name} names {_some(missing)}, which is missing", "complete the checkpoint")
    of_vllm = _files_of_vllm(name, directory)
    if set(chosen) != set(of_vllm):
        mine, other = ([file.name for file in files] for files in (chosen, of_vllm))
        surplus = sorted(set(other) - set(mine))
        if first.name != SAFETENSORS_INDEX and (directory / SAFETENSORS_INDEX).is_file():
            surplus.append(SAFETENSORS_INDEX)
        raise ModelError(
            f"{name}: it has the weights of more than one model: transformers loads {_some(mine)}, vLLM {_some(other)}",
            f"remove {_some(surplus)} to keep {_some(mine)}, or the other way round" if surplus else "save it again",
        )
    return chosen


def whole_weights(directory: Path) -> list[str]:
    """The names of files that look like the weights of a whole model, or of a part of one."""
    names = {file.name for pattern in WEIGHT_PATTERNS for file in _glob(directory, pattern)}
    return sorted(names | {each for each in WEIGHTS if (directory / each).is_file()})


def check_weights(name: str, files: Sequence[Path]) -> None:
    """Checks weight files as far as their beginnings tell.

    Raises:
        ModelError: a file cannot be read, is empty, cut off, or a pointer of Git LFS, or two files have a tensor of the
            same name.
    """
    place: dict[str, str] = {}
    for file in files:
        try:
            with open(file, "rb") as opened:
                start = opened.read(len(LFS_POINTER))
        except OSError as error:
            raise ModelError(
                f"{name}: {file.name} cannot be read: {error.strerror}", "check its permissions"
            ) from error
        if start == LFS_POINTER:
            raise ModelError(f"{name}: {file.name} is a pointer of Git LFS, not the weights", "run git lfs pull there")
        if not start:
            raise ModelError(f"{name}: {file.name} is empty", "download or save it again")
        if file.suffix != ".safetensors":
            continue
        for tensor in tensor_shapes(name, file):
            if tensor in place:
                both = f"both {place[tensor]} and {file.name}"
                raise ModelError(f"{name}: {both} have the tensor {tensor}", "save the checkpoint again")
            place[tensor] = file.name


def tensor_shapes(name: str, file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, from its header.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(file, "np") as opened:  # needs no torch
            return {tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problem = f"{name}: transformers cannot load it: {file.name} is damaged ({error})"
        raise ModelError(problem, "download or save it again") from error


def read_json(name: str, file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: its {file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: its {file.name} cannot be read: it is no JSON object")
    return content


def digest_files(files: Iterable[Path]) -> list[str]:
    """A line for each file: its name and the digest of its bytes."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        files = list(files)
        return [f"{file.name} {digest}" for file, digest in zip(files, pool.map(_digest_file, files), strict=True)]


def digest_lines(lines: Iterable[str]) -> str:
    """The digest of lines of text."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _files_of_vllm(name: str, directory: Path) -> list[Path]:
    """The files that vLLM's default loader takes for ``load_format="hf"``."""
    safetensors, index = _glob(directory, "*.safetensors"), directory / SAFETENSORS_INDEX
    if safetensors:
        return [file for file in safetensors if file in _shards(name, index)] if index.is_file() else safetensors
    return [file for file in _glob(directory, "*.bin") if not file.name.endswith(NO_WEIGHTS)]


def _shards(name: str, index: Path) -> list[Path]:
    weight_map = read_json(name, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(each, str) for each in weight_map.values()):
        raise ModelError(f"{name}: its {index.name} cannot be read: it has no weight_map")
    return sorted({index.parent / each for each in weight_map.values()})


def _glob(directory: Path, pattern: str) -> list[Path]:
    return sorted(file for file in directory.glob(pattern) if file.is_file() and not file.name.startswith("."))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") or "none"


def _digest_file(path: Path) -> str:
    status = path.stat()
    return _digest_bytes(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _digest_bytes(path: Path, *state: int) -> str:
    """The digest of a file in this state. It is cached: evaluation needs the same large models several times."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
