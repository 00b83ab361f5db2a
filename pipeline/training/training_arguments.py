"""From the options of ``distill`` to the arguments of transformers' Trainer."""

import sys
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from adpa.errors import OptionError
from adpa.pipeline.models.devices import resolve_device

# A resumed run must have the same values of these.
TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm",
    "num_train_epochs", "max_steps", "seed", "bf16", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "neftune_noise_alpha",
)  # fmt: skip


def make_training_arguments(device: str, **arguments: Any) -> TrainingArguments:
    """Trainer's arguments: those of ``distill``'s options and of ``--set``, and those that adpa sets for every run.

    Args:
        device: auto, cpu or cuda.
        arguments: arguments from options and from ``--set``, by Trainer's names.

    Raises:
        OptionError: Trainer refuses an argument, or cannot begin with them.
    """
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
        raise OptionError(f"transformers.TrainingArguments refuses the options: {_short(error)}") from error
    precision = "bf16" if made.bf16 else "no"
    if made.mixed_precision != precision:
        raise OptionError(
            f"the launcher asks for {made.mixed_precision}, the options for {precision}",
            "give --bf16, or accelerate launch --mixed_precision no",
        )
    made._n_gpu = min(made.n_gpu, 1)  # one process drives one GPU: no DataParallel
    _try_out(made)
    return made


def _try_out(arguments: TrainingArguments) -> None:
    """Makes the trackers, the optimizer and the schedule for a model of one layer, before any other model is loaded.

    Raises:
        OptionError: one of them refuses the options.
    """
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise OptionError(f"--report-to: {_short(error)}") from error
    if arguments.deepspeed or arguments.optim_target_modules:  # these need the layers of the student
        return
    layer = torch.nn.Linear(1, 1)
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)  # type: ignore[arg-type]
        optimizer = make(layer.parameters(), **options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(
            f"--set optim={OptimizerNames(arguments.optim).value}: {_short(error)}", "choose another one"
        ) from error
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]  # no text: it was read,
        )
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"--lr-scheduler-type {SchedulerType(arguments.lr_scheduler_type).value}: {_short(error)}"
        ) from error


def _short(error: BaseException) -> str:
    """The message of a library's error, in one line."""
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__
