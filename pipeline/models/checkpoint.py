"""Checkpoints: turns the name that a user types into a directory, an identity and a loaded model."""

import gc
import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adpa.data.cache.signals import ModelIdentity
from adpa.data.vocabulary import load_tokenizer
from adpa.errors import HeadError, ModelError
from adpa.pipeline.models.lm_head import LmHead, check_head, read_head
from adpa.pipeline.options import DtypeName

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
HUB_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory and the name that the user typed."""

    name: str
    revision: str | None
    directory: Path

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the expensive digest, not the cheap config and tokenizer."""
        return {name: value for name, value in vars(self).items() if name not in ("config", "tokenizer")}

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name, revision, and the digest of configuration and weights; reads all of their bytes, once per process."""
        files = [self.directory / "config.json", *_weight_files(self.directory)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            digests = pool.map(_digest_file, files)
            lines = [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]
        return ModelIdentity(
            self.name, self.revision, hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model in the checkpoint."""
        return self._read_config()[1]

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end generation, in the order of generation_config.json or, without it, of config.json.

        Ids that the model has no token for are left out: it never says them.

        Raises:
            ModelError: generation_config.json cannot be read, or an id is no whole number.
        """
        if (self.directory / "generation_config.json").is_file():
            try:
                ids = GenerationConfig.from_pretrained(self.directory).eos_token_id
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{self.name}: its generation_config.json cannot be read: {_first_line(error)}"
                ) from error
        else:
            ids = getattr(self.config, "eos_token_id", None)
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if strange := [one for one in ids if type(one) is not int]:
            raise ModelError(f"{self.name}: found {strange[0]!r} in its eos_token_id; expected token ids")
        return tuple(one for one in dict.fromkeys(ids) if 0 <= one < self.config.vocab_size)

    @property
    def is_multimodal(self) -> bool:
        """Whether the language model is part of a larger model."""
        whole, text = self._read_config()
        return whole is not text

    @property
    def is_quantized(self) -> bool:
        """Whether weights on disk are quantized: all of them, or some."""
        return getattr(self._read_config()[0], "quantization_config", None) is not None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights."""
        return load_tokenizer(self.directory)

    def dtype_name(self, dtype: DtypeName) -> str:
        """The dtype to compute in; ``auto`` is the checkpoint's own."""
        return str(self.config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype

    def load(self, dtype: str, device: torch.device, **options: Any) -> PreTrainedModel:
        """Loads the model; ``options`` are further options of ``from_pretrained``.

        Raises:
            ModelError: transformers cannot load it, or its weights do not match the configuration.
        """
        # cuDNN's attention makes a plan for each new shape, and our shapes change with every batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        model, unexpected = self._load(dtype, **options)
        self._refuse_keys("unexpected_keys", unexpected)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to without its overloads
        return model

    def load_head(self, dtype: str, device: torch.device) -> LmHead:
        """Loads the head alone: it loads the model without its layers, whose weights stay on disk.

        The head is checked in float32. Its numbers are those of the whole model loaded in ``dtype``.

        Raises:
            HeadError: the head is not one that adpa knows, or its weights are quantized.
            ModelError: the checkpoint is not complete.
        """
        config, text_config = self._read_config()
        if text_config is not config:
            raise HeadError(f"{self.name}: it is more than a language model")
        config.num_hidden_layers = 0
        if getattr(config, "layer_types", None) is not None:
            with suppress(AttributeError):  # some configurations derive it from the number of layers
                config.layer_types = []
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would list the weights of all layers as unexpected
        try:
            model, unexpected = self._load("float32", config=config)
            model.eval()
            check_head(model)
            head = read_head(model)
            # Quantized weights have their scales beside them; transformers would ignore the scales here.
            modules = {
                name.rpartition(".")[0]
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter is head.weight
            }
            self._refuse_keys("unexpected_keys", [key for key in unexpected if key.rpartition(".")[0] in modules])
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise HeadError(f"{self.name}: it does not run without its layers: {_first_line(error)}") from error
        except ModelError as error:
            if self.is_quantized:
                raise HeadError(error.args[0]) from error
            raise
        finally:
            transformers.logging.set_verbosity(verbosity)
        return head.to(device, getattr(torch, dtype))

    def _read_config(self) -> tuple[PretrainedConfig, PretrainedConfig]:
        """The configurations of the whole model and of its language model, which may be the same object."""
        try:
            config = AutoConfig.from_pretrained(self.directory)
            return config, config.get_text_config(decoder=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.name}: its config.json cannot be read: {_first_line(error)}") from error

    def _load(self, dtype: str, **options: Any) -> tuple[PreTrainedModel, Sequence[str]]:
        """The model, and the names of the weights on disk that it has no parameter for."""
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{self.name}: transformers cannot load it: {_first_line(error)}") from error
        model: PreTrainedModel
        model, information = loaded
        # transformers fills missing weights with random numbers and only warns.
        for problem in ("missing_keys", "mismatched_keys"):
            self._refuse_keys(problem, information[problem])
        return model, list(information["unexpected_keys"])

    def _refuse_keys(self, problem: str, keys: Iterable[object]) -> None:
        if names := sorted(map(str, keys)):
            raise ModelError(
                f"{self.name}: its weights have {len(names)} {problem.replace('_', ' ')}, the first {names[0]}",
                "save the checkpoint again as a causal language model",
            )

    def weight_bytes(self, dtype: str) -> int:
        """About how many bytes the weights take in a dtype; for quantized weights, their size on disk."""
        # A directory may hold the same weights in both formats.
        files = [list(self.directory.glob(pattern)) for pattern in WEIGHT_PATTERNS]
        size = sum(path.stat().st_size for path in next(filter(None, files)))
        if self.is_quantized:
            return size
        return size * getattr(torch, dtype).itemsize // getattr(torch, self.dtype_name("auto")).itemsize

    def check_memory(self, dtype: str, room: int, advice: str) -> None:
        """Checks, by the size on disk, that the weights fit into ``room`` bytes in a dtype.

        Raises:
            ModelError: they do not; ``advice`` is its fix.
        """
        needed = self.weight_bytes(dtype)
        if needed > room:
            raise ModelError(
                f"{self.name}: its weights take about {needed / 1e9:.1f} GB in {dtype}; there is room for "
                f"{room / 1e9:.1f} GB",
                advice,
            )

    def check_here(self) -> None:
        """Checks that this machine has the directory of the checkpoint, which another machine may have opened.

        Raises:
            ModelError: it has not.
        """
        if not self.directory.is_dir():
            raise ModelError(
                f"{self.name}: {platform.node()} has no {self.directory}",
                "use a directory that every machine sees; for models of the Hub, set HF_HOME to one",
            )

    def check_ids(self, largest: int) -> None:
        """Checks that the model has an embedding for every token id up to the largest.

        Raises:
            ModelError: it has not.
        """
        if largest >= self.config.vocab_size:
            raise ModelError(
                f"{self.name}: the data has the token id {largest}; the model has {self.config.vocab_size} embeddings",
                "use the model that belongs to this tokenizer",
            )

    def check_positions(self, lengths: Sequence[int]) -> None:
        """Checks that the model has a position for every token of sequences of these lengths.

        Raises:
            ModelError: it has not.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if (getattr(self.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            # With a longer sequence in the batch, LongRoPE changes the frequencies of all positions.
            limit = self.config.rope_parameters.get("original_max_position_embeddings", limit)
        longer = [length for length in lengths if limit is not None and length > limit]
        if longer:
            raise ModelError(
                f"{self.name}: {len(longer)} of {len(lengths)} sequences need more positions, up to {max(longer)}, "
                f"than the model has, {limit}",
                "lower --max-length, --max-prompt-length or --max-new-tokens",
            )


def open_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint: a local directory, or ``org/name`` or ``org/name@revision`` on the Hub.

    Raises:
        ModelError: the checkpoint does not exist, or has no configuration or no weights.
    """
    directory, revision = Path(name), None
    if not directory.is_dir():
        hub_name, _, revision_name = name.partition("@")
        try:
            for weights in WEIGHT_PATTERNS:  # the second only if the first has no file
                patterns = [*HUB_PATTERNS, weights]
                path = snapshot_download(hub_name, revision=revision_name or None, allow_patterns=patterns)
                directory = Path(path)
                if _weight_files(directory):
                    break
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"{name}: no such directory, and the Hub does not give it ({_first_line(error)})",
                "check the name of the checkpoint",
            ) from error
        revision = directory.name
    if not (directory / "config.json").is_file():
        raise ModelError(f"{name}: found no config.json; expected a Hugging Face checkpoint directory")
    if not _weight_files(directory):
        raise ModelError(f"{name}: found no weights; expected one of {', '.join(WEIGHT_PATTERNS)}")
    return Checkpoint(name, revision, directory.absolute())


def resolve_device(device: str) -> torch.device:
    """The device to compute on; ``auto`` is a GPU if the machine has one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: {_first_line(error)}", "use cpu, or a device that torch sees") from error


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


def _weight_files(directory: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern))


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
