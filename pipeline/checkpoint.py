"""Checkpoints: from what a user types to a directory, an identity and a loaded model."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adpa.data.signals import ModelIdentity
from adpa.data.vocabulary import load_tokenizer
from adpa.errors import ModelError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
HUB_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory and what a user called it."""

    name: str
    revision: str | None
    directory: Path

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name, revision and the digest of configuration and weights; reads every byte of them once."""
        files = [self.directory / "config.json", *_weight_files(self.directory)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            digests = pool.map(_digest_file, files)
            lines = [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]
        return ModelIdentity(
            self.name, self.revision, hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
        )

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model in it."""
        try:
            return AutoConfig.from_pretrained(self.directory).get_text_config(decoder=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.name}: its config.json cannot be read: {_first_line(error)}") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights."""
        return load_tokenizer(self.directory)

    def dtype_name(self, dtype: DtypeName) -> str:
        """The dtype to compute in; ``auto`` is the checkpoint's own."""
        return str(self.config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype

    def load(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """Loads the model.

        Raises:
            ModelError: transformers cannot load it, or its weights are not all those that the configuration asks for.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{self.name}: transformers cannot load it: {_first_line(error)}") from error
        model: PreTrainedModel
        model, information = loaded
        # transformers fills what is missing with random numbers and only warns.
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if keys := sorted(map(str, information[problem])):
                raise ModelError(
                    f"{self.name}: its weights have {len(keys)} {problem.replace('_', ' ')}, the first {keys[0]}",
                    "save the checkpoint again as a causal language model",
                )
        model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to without its overloads
        return model

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

    def check_positions(self, tokens: int) -> None:
        """Checks that the model has a position for every one of so many tokens.

        Raises:
            ModelError: it has not.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ModelError(
                f"{self.name}: a sequence has up to {tokens} tokens; the model has {limit} positions",
                "lower --max-length, --max-prompt-length or --max-new-tokens",
            )


def open_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint: a local directory, or ``org/name`` or ``org/name@revision`` on the Hub.

    Raises:
        ModelError: there is no such checkpoint, or it has no configuration or weights.
    """
    directory, revision = Path(name), None
    if not directory.is_dir():
        hub_name, _, revision_name = name.partition("@")
        try:
            for weights in WEIGHT_PATTERNS:  # the second only where the first is not there
                patterns = [*HUB_PATTERNS, weights]
                found = snapshot_download(hub_name, revision=revision_name or None, allow_patterns=patterns)
                directory = Path(found)
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
    return Checkpoint(name, revision, directory)


def resolve_device(device: str) -> torch.device:
    """The device to compute on; ``auto`` is a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: {_first_line(error)}", "use cpu, or a device that torch sees") from error


def _weight_files(directory: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern))


def _digest_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
