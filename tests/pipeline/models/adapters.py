"""Adapters for tests: PEFT saves them with random numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adpa.pipeline.models.checkpoint import open_checkpoint

CPU = torch.device("cpu")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def save_adapter(
    base: Path, to: Path, config: PeftConfig | None = None, seed: int = 1, rows: int | None = None
) -> Path:
    """An adapter with random numbers, as PEFT saves it."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        loaded.resize_token_embeddings(rows)
    torch.manual_seed(seed)
    model: Any = get_peft_model(loaded, config or LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(to)
    return to


def copy(adapter: Path, to: Path) -> Path:
    shutil.copytree(adapter, to)
    return to


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def digest(directory: Path) -> str:
    return open_checkpoint(str(directory)).identity.digest


def logits(model: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(3, 96, (2, 9))).logits
