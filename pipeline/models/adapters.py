"""Adapters of PEFT: their files and identity, merging them into their base, new ones for training.

An adapter is a directory with adapter_config.json, which names a base, and weights that change the base's layers; LoRA
is the usual kind. adpa runs the base with the adapter merged into it.

The only module that imports PEFT.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from transformers import PreTrainedModel

from adpa.errors import ModelError
from adpa.pipeline.models.model_names import BASE
from adpa.pipeline.models.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_weights,
    digest_files,
    digest_lines,
    read_json,
    tensor_shapes,
)

NOT_MERGED = ("XLORA", "POLY")  # besides prompts
MERGE_YOURSELF = "merge it with PEFT, and save that"
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def check_adapter(name: str, directory: Path) -> None:
    """Checks that an adapter is complete and that PEFT can merge it, as far as its configuration tells.

    Raises:
        ModelError: it is not, or PEFT is not installed.
    """
    check_weights(name, [_weights(name, directory)])
    if find_spec("peft") is None:
        raise ModelError(f"{name}: it is an adapter, and PEFT is not installed", "pip install 'adpa[lora]'")
    if not read_json(name, directory / ADAPTER_CONFIG).get("peft_type"):
        raise ModelError(f"{name}: its {ADAPTER_CONFIG} has no peft_type", "save the adapter again")
    config = _read_config(name, directory)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt or kind in NOT_MERGED:
        raise ModelError(f"{name}: an adapter of the kind {kind} cannot be merged into its base", "use LoRA instead")
    if getattr(config, "alora_invocation_tokens", None):  # it changes the tokens behind these alone
        raise ModelError(f"{name}: an activated LoRA cannot be merged into its base", "use LoRA instead")
    if getattr(config, "layer_replication", None):
        raise ModelError(f"{name}: its adapter repeats layers of the base (layer_replication)", MERGE_YOURSELF)
    rows = embedding_rows(name, directory)
    if len(set(rows.values())) > 1:
        raise ModelError(f"{name}: its embeddings and its head have different numbers of rows: {rows}", MERGE_YOURSELF)


def digest_adapter(name: str, directory: Path, base: str) -> str:
    """The digest of an adapter on a base with this digest. It does not depend on where the two lie."""
    config = {key: value for key, value in read_json(name, directory / ADAPTER_CONFIG).items() if key not in BASE}
    digest = digest_lines([json.dumps(config, sort_keys=True)])
    return digest_lines([f"base {base}", f"{ADAPTER_CONFIG} {digest}", *digest_files([_weights(name, directory)])])


def embedding_rows(name: str, directory: Path) -> dict[str, int]:
    """The number of rows of each embedding matrix, the head's included, that an adapter brings whole."""
    path = _weights(name, directory)
    if path.suffix == ".safetensors":
        shapes = tensor_shapes(name, path)
    else:
        try:
            # Only the old format, before zip archives, is read whole.
            weights = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ModelError(f"{name}: its {path.name} is damaged ({_line(error)})", "save it again") from error
        if not isinstance(weights, dict) or not all(isinstance(each, torch.Tensor) for each in weights.values()):
            raise ModelError(f"{name}: its {path.name} has something else than named tensors", "save it again")
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    suffixes = {f".{each}{layer}.weight": each for each in EMBEDDINGS for layer in ("", ".base_layer")}
    return {each: shape[0] for key, shape in shapes.items() for end, each in suffixes.items() if key.endswith(end)}


def merge(name: str, model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Merges the adapter in a directory into its base, in the dtype of the base; changes ``model``.

    Raises:
        ModelError: the adapter does not belong to this model, or cannot be merged.
    """
    from peft import PeftModel

    config = _read_config(name, directory)
    config.inference_mode = True
    try:
        with torch.random.fork_rng(devices=[]):  # for PEFT's starting values, which the adapter's replace
            _resize_embeddings(name, model, embedding_rows(name, directory))
            adapted: Any = PeftModel(model, config)
        _refuse_tied(name, model)
        mapping = getattr(model, "_checkpoint_conversion_mapping", {})  # as PeftModel.from_pretrained has it
        loaded = adapted.load_adapter(directory, "default", torch_device=str(model.device), key_mapping=mapping)
        _refuse_other_weights(name, loaded)
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (ModelError, torch.OutOfMemoryError):
        raise
    except KeyError as error:
        raise ModelError(f"{name}: its weights lack {error.args[0]}", "save the adapter again") from error
    except NotImplementedError as error:
        raise ModelError(
            f"{name}: this kind of adapter cannot be merged: {_line(error)}", "use LoRA instead"
        ) from error
    except (ValueError, RuntimeError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
        raise ModelError(
            f"{name}: PEFT cannot merge it into its base: {_line(error)}", "name the base that it was trained on"
        ) from error
    return merged.requires_grad_(True)  # PEFT has frozen it


def add(model: PreTrainedModel, **settings: Any) -> Any:
    """Wraps a model into a PeftModel with new LoRA adapters; the settings are those of ``LoraConfig``."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**settings))


def _weights(name: str, directory: Path) -> Path:
    for each in ADAPTER_WEIGHTS:
        if (directory / each).is_file():
            return directory / each
    raise ModelError(f"{name}: found {ADAPTER_CONFIG}, but no {' or '.join(ADAPTER_WEIGHTS)}", "save the adapter again")


def _read_config(name: str, directory: Path) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(directory))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{name}: PEFT cannot read its {ADAPTER_CONFIG}: {_line(error)}") from error


def _refuse_other_weights(name: str, loaded: Any) -> None:
    """PEFT leaves its starting values where weights are missing and only warns; unexpected weights it leaves out."""
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(getattr(loaded, problem)):
            raise ModelError(
                f"{name}: its weights have {len(keys)} {problem.replace('_', ' ')}, the first {keys[0]}",
                f"save the adapter again, or correct its {ADAPTER_CONFIG}",
            )


def _resize_embeddings(name: str, model: PreTrainedModel, rows: dict[str, int]) -> None:
    """Gives the base as many embeddings as the adapter brings."""
    embeddings: Any = model.get_input_embeddings()
    before, after = len(embeddings.weight), max(rows.values(), default=len(embeddings.weight))
    if after == before:
        return
    if len(rows) == 1 and model.get_output_embeddings().weight is not embeddings.weight:
        raise ModelError(
            f"{name}: it has {after} embeddings, its base {before}, and it brings {next(iter(rows))} alone",
            "save the adapter with both embeddings and head",
        )
    model.resize_token_embeddings(after, mean_resizing=False)


def _refuse_tied(name: str, model: PreTrainedModel) -> None:
    """A matrix that is both embedding and head cannot take a change of one of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config(decoder=True).tie_word_embeddings and any(
        isinstance(module, BaseTunerLayer) for module in ends
    ):
        raise ModelError(
            f"{name}: its adapter changes embeddings that are also the head, and cannot be merged into them",
            "train it on other layers, or on a base whose embeddings are not tied",
        )


def _line(error: Exception) -> str:
    """The line of an error that says the most; the first line of torch is a title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
