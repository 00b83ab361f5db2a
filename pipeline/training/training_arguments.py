"""From the options of ``distill`` to the arguments of transformers' Trainer."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_available

from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import resolve_device
from adpa.yaml_options import as_number

_BATCHES = "--batch-size sets the examples of a step, and --micro-batch-size says how many fit in memory at a time"
_EVALUATION = "adpa evaluate compares students"
_ORDER = "every example is in one step of an epoch, in an order that --seed fixes"
# Fields of TrainingArguments that adpa sets itself, so that a step does not depend on micro-batches and ranks.
OWN_ARGUMENTS = {
    "output_dir": "--output says where",
    "use_cpu": "--device says where",
    "fp16": "float16 loses small gradients in the loss head",
    "save_only_model": "a run could not resume from such a checkpoint",
    "remove_unused_columns": "a batch has columns that no model's forward names",
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    "disable_tqdm": "a terminal shows a progress bar",
    "average_tokens_across_devices": "losses are means over the tokens of all ranks",
    "per_device_train_batch_size": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "auto_find_batch_size": _BATCHES,
    "train_sampling_strategy": _ORDER,
    "dataloader_drop_last": _ORDER,
    "data_seed": _ORDER,
    "accelerator_config": _ORDER,
    "ignore_data_skip": _ORDER,
    "parallelism_config": "fsdp or deepspeed shards a student over ranks",
    "label_smoothing_factor": "losses are adpa's own",
    "eval_strategy": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "resume_from_checkpoint": "--resume-from-checkpoint says it",
}
# A resumed run must have the same values of these.
TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm",
    "num_train_epochs", "max_steps", "seed", "bf16", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "neftune_noise_alpha",
)  # fmt: skip


def make_training_arguments(overrides: Sequence[str], device: str, **arguments: Any) -> TrainingArguments:
    """Trainer's arguments: those of ``distill``'s options, those of ``--set``, and those that adpa sets for every run.

    Args:
        overrides: key=value of each ``--set``.
        device: auto, cpu or cuda.
        arguments: arguments from options, by Trainer's names.

    Raises:
        OptionError: Trainer has no such argument or refuses it, or adpa sets it itself.
    """
    known = {field.name for field in fields(TrainingArguments)}
    options = {name: f"--{name.replace('_', '-')} says it" for name in arguments if name != "save_strategy"}
    own = options | OWN_ARGUMENTS
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in known:
            raise OptionError(f"--set {override}; expected key=value with a field of transformers.TrainingArguments")
        if key in own:
            raise OptionError(f"--set {override}: {own[key]}", "leave it out")
        try:
            arguments[key] = as_number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise OptionError(f"--set {override}: {' '.join(str(error).split())}", "write the value as YAML") from error
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {device}; expected auto, cpu or cuda", "choose a GPU by CUDA_VISIBLE_DEVICES")
    if arguments.get("deepspeed") and not is_deepspeed_available():
        raise OptionError("--set deepspeed without DeepSpeed", "pip install deepspeed")
    use_cpu = resolve_device(device).type == "cpu"
    if arguments["bf16"] is None:
        arguments["bf16"] = not use_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if not use_cpu and "dataloader_num_workers" not in arguments:
        arguments = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True} | arguments
    try:
        made = TrainingArguments(
            **arguments,
            use_cpu=use_cpu,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            disable_tqdm=not sys.stderr.isatty(),
            average_tokens_across_devices=False,  # Trainer would gather labels for a number that is not used
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise OptionError(f"transformers.TrainingArguments refuses the options: {error}") from error
    precision = "bf16" if made.bf16 else "no"
    if made.mixed_precision != precision:
        raise OptionError(
            f"the launcher asks for {made.mixed_precision}, the options for {precision}",
            "give --bf16, or accelerate launch --mixed_precision no",
        )
    made._n_gpu = min(made.n_gpu, 1)  # one process drives one GPU: no DataParallel
    return made
