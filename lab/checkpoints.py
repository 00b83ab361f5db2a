"""Trains the laboratory's checkpoints, as ordinary Hugging Face directories, and writes its preference pairs.

A large model is pretrained on responses of mixed quality. Fine-tuning on the chosen responses turns it into the
reference. DPO against the reference turns the reference into the teacher. The student is pretrained and fine-tuned in
the same way, but is too small to do as well.

Functions import TRL when they use it, because its import takes seconds and no other command needs it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import disable_progress_bars
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers import logging as transformers_logging

from adpa.lab.environment import Environment, Pair, Prompt, completion_row, preference_row
from adpa.lab.tokenizer import build_tokenizer

CORPUS_SIZE = 16_000
PRETRAINING_BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """The size of a model and the length of its training."""

    layers: int
    width: int
    pretraining_steps: int
    pretraining_rate: float
    fine_tuning_epochs: int
    fine_tuning_rate: float


TEACHER = Recipe(
    layers=2,
    width=128,
    pretraining_steps=400,
    pretraining_rate=5e-3,
    fine_tuning_epochs=2,
    fine_tuning_rate=1e-3,
)
STUDENT = Recipe(
    layers=1,
    width=64,
    pretraining_steps=1000,
    pretraining_rate=8e-3,
    fine_tuning_epochs=2,
    fine_tuning_rate=2e-3,
)
DPO_BETA = 0.3
DPO_RATE = 2e-4


@dataclass(frozen=True)
class Plan:
    """The settings of a laboratory: environment, number of preference pairs, and the sizes of both models."""

    environment: Environment = field(default_factory=Environment)
    pairs: int = 3_000
    teacher: Recipe = TEACHER
    student: Recipe = STUDENT


@dataclass(frozen=True)
class Laboratory:
    """The paths of the laboratory's checkpoints and pairs."""

    directory: Path

    @property
    def teacher(self) -> Path:
        return self.directory / "teacher"

    @property
    def reference(self) -> Path:
        return self.directory / "reference"

    @property
    def student(self) -> Path:
        return self.directory / "student"

    @property
    def preferences(self) -> Path:
        return self.directory / "preferences.jsonl"


def build_laboratory(directory: Path, seed: int, plan: Plan = Plan()) -> Laboratory:
    """Trains and saves all checkpoints. Everything follows from the seed. Prints a line for each step."""
    laboratory = Laboratory(directory)
    directory.mkdir(parents=True)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    texts = plan.environment.corpus(CORPUS_SIZE, seed)
    pairs = plan.environment.preference_pairs(plan.pairs, seed)
    write_preferences(pairs, laboratory.preferences)

    for name, path, recipe in (
        ("teacher", laboratory.reference, plan.teacher),
        ("student", laboratory.student, plan.student),
    ):
        model = _new_model(recipe, tokenizer, seed)
        with _timed(f"pretraining the {name}"):
            _pretrain(model, tokenizer, texts, recipe, seed)
        with _timed(f"SFT of the {name}"):
            _fine_tune(model, tokenizer, pairs, recipe, path, seed)
    with _timed("DPO of the teacher"):
        align(laboratory.reference, laboratory.preferences, laboratory.teacher, seed)
    return laboratory


def write_preferences(pairs: Sequence[Pair], path: Path) -> None:
    path.write_text("".join(json.dumps(preference_row(pair)) + "\n" for pair in pairs))


def encode(
    texts: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [N, T]. Labels are −100 for prompts, which all have the same length, and for padding."""
    rows = [completion_row(prompt, response) for prompt, response in texts]
    conversations = [
        str(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)) for row in rows
    ]
    prompt = str(tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True))
    encoded = tokenizer(
        conversations, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    labels[:, : len(tokenizer.tokenize(prompt))] = -100
    return encoded["input_ids"], labels


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[Prompt, str]],
    recipe: Recipe,
    seed: int,
) -> None:
    """Next-token prediction on the responses, in a plain loop: a Trainer would double the time of such small steps."""
    input_ids, labels = encode(texts, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.pretraining_rate, total_steps=recipe.pretraining_steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(recipe.pretraining_steps):
        rows = torch.randint(len(texts), (PRETRAINING_BATCH,), generator=generator)
        model(input_ids=input_ids[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    recipe: Recipe,
    output: Path,
    seed: int,
) -> None:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [completion_row(pair.prompt, pair.chosen) for pair in pairs]
    arguments = SFTConfig(
        **_trainer_settings(output, seed),
        num_train_epochs=recipe.fine_tuning_epochs,
        learning_rate=recipe.fine_tuning_rate,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _save(model, tokenizer, output)


def align(
    checkpoint: Path,
    preferences: Path,
    output: Path,
    seed: int,
    learning_rate: float = DPO_RATE,
    num_train_epochs: float = 1,
    beta: float = DPO_BETA,
) -> None:
    """Trains a checkpoint with TRL's DPO. The reference is the checkpoint itself."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    arguments = DPOConfig(
        **_trainer_settings(output, seed), num_train_epochs=num_train_epochs, learning_rate=learning_rate, beta=beta
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _save(model, tokenizer, output)


def _trainer_settings(output: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "seed": seed,
        "per_device_train_batch_size": 64,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def _timed(step: str) -> Iterator[None]:
    print(f"{step}: ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)
