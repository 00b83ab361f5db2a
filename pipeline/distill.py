"""Stage two: trains a student from the signals in a cache."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from transformers import PreTrainedTokenizerBase, PrinterCallback, SchedulerType, TrainingArguments, set_seed
from typing_extensions import Doc

from adpa.data.batches import Packing, TrainingExamples, collate
from adpa.data.locations import Location
from adpa.data.responses import ResponseName
from adpa.data.selection import Need, Selection, select
from adpa.data.shards import write_file
from adpa.data.summary import PLAUSIBLE
from adpa.data.vocabulary import check_same_vocabulary, read_tokenizer
from adpa.errors import OptionError
from adpa.pipeline.checkpoint import Checkpoint, DtypeName, open_checkpoint, resolve_device
from adpa.pipeline.directories import check_writable
from adpa.pipeline.objectives import ObjectiveName, check_plausibility, objective_terms
from adpa.pipeline.packed_attention import allow_packing
from adpa.pipeline.student import attach_distill_head
from adpa.pipeline.trainer import DistillTrainer
from adpa.pipeline.yaml_options import as_number

RECORD = "adpa.json"

SchedulerName = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]


@dataclass(frozen=True)
class DistillReport:
    """What ``distill`` did.

    Attributes:
        objective: the objective.
        output: the directory of the trained student.
        scoring: id of the scoring it learned from, if any.
        responses: id of each response set it read.
        examples: preference pairs.
        steps: optimizer steps in all.
        first_loss: loss at the first log.
        last_loss: loss at the last log.
        tokens_per_second: tokens of prompts and responses, see ``DistillTrainer.tokens_per_second``.
        seconds: wall-clock time.
        warnings: what the run warned of.
    """

    objective: ObjectiveName
    output: str
    scoring: str | None
    responses: dict[str, str]
    examples: int
    steps: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    seconds: float
    warnings: list[str]


def distill(
    objective: Annotated[ObjectiveName, Doc("What to minimise: sft, kd, dckd or adpa.")],
    student: Annotated[str, Doc("The small model to train: a directory, or org/name[@revision] of the Hub.")],
    cache: Annotated[Location, Doc("Directory of the teacher-signal cache, or a URL such as s3://bucket/folder.")],
    output: Annotated[Path, Doc("Directory for the trained student; it must be empty.")],
    on: Annotated[
        ResponseName | None,
        Doc("Responses that get the KL term of kd (chosen unless given) or the advantage term of adpa (sampled)."),
    ] = None,
    kl_weight: Annotated[
        float | None, Doc("α, the weight of the KL terms: 1 for kd and dckd, 0 for adpa unless given.")
    ] = None,
    advantage_weight: Annotated[float, Doc("γ, the weight of the advantage term of adpa.")] = 0.5,
    plausibility: Annotated[
        float,
        Doc(
            "Keep a positive advantage only where the teacher's probability is at least this: for tokens that both "
            "models find implausible it says little, and a large γ would follow it there. 0 is the published form."
        ),
    ] = PLAUSIBLE,
    scoring: Annotated[str | None, Doc("Scoring to learn from (the beginning of its id), if several fit.")] = None,
    response_set: Annotated[
        list[str] | None, Doc("Response set to train on (the beginning of its id), if several fit; repeatable.")
    ] = None,
    learning_rate: Annotated[float, Doc("Peak learning rate.")] = 2e-5,
    num_train_epochs: Annotated[float, Doc("Passes over the examples.")] = 1.0,
    max_steps: Annotated[int, Doc("Optimizer steps; outranks the epochs unless −1.")] = -1,
    batch_size: Annotated[int, Doc("Examples of an optimizer step, over all ranks.")] = 32,
    micro_batch_size: Annotated[
        int | None, Doc("Examples that fit in memory at a time; 4 unless given, or what divides the batch.")
    ] = None,
    packing: Annotated[
        Packing,
        Doc(
            "How a micro-batch is computed: none pads its sequences; sequences computes them without padding; prompts "
            "also computes equal prompts once. Loss and gradient are the same; a student that cannot is refused."
        ),
    ] = "none",
    lr_scheduler_type: Annotated[SchedulerName, Doc("Course of the learning rate.")] = "cosine",
    warmup_steps: Annotated[float, Doc("Steps of warm-up; below 1, a share of all steps.")] = 0.1,
    weight_decay: Annotated[float, Doc("Weight decay of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, Doc("The gradient's norm is clipped to this.")] = 1.0,
    gradient_checkpointing: Annotated[bool, Doc("Recompute activations in the backward pass to save memory.")] = False,
    bf16: Annotated[bool, Doc("Compute in bfloat16, with weights in --dtype.")] = False,
    dtype: Annotated[DtypeName, Doc("Dtype of the weights in training; auto is the checkpoint's own.")] = "float32",
    device: Annotated[str, Doc("cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    seed: Annotated[int, Doc("Seed of the order of the examples, and of dropout.")] = 0,
    logging_steps: Annotated[int, Doc("Steps between two logs, each with a look at 32 examples.")] = 10,
    save_steps: Annotated[int, Doc("Steps between two checkpoints; 0 saves only the trained student.")] = 0,
    resume_from_checkpoint: Annotated[
        str | None, Doc("A checkpoint directory to go on from, or last for the newest one in --output.")
    ] = None,
    report_to: Annotated[str, Doc("Experiment tracker: none, wandb, tensorboard, …")] = "none",
    set: Annotated[list[str] | None, Doc("key=value of any transformers.TrainingArguments field; repeatable.")] = None,
) -> DistillReport:
    """Train a student from the signals in a cache.

    The trained student is an ordinary checkpoint, with the teacher's tokenizer and chat template, and with
    adpa.json, which says how it was made.

    Raises:
        AdpaError: something about the arguments, the cache or the student that the caller can put right.
    """
    started = time.perf_counter()
    terms = objective_terms(objective, on, kl_weight, advantage_weight)
    check_plausibility(plausibility)
    if packing not in get_args(Packing):
        raise OptionError(f"--packing {packing!r}; expected one of {', '.join(get_args(Packing))}")
    if max_steps != -1 and max_steps < 1:
        raise OptionError(f"--max-steps {max_steps}; expected at least 1, or −1 for no limit")
    if not num_train_epochs > 0:
        raise OptionError(f"--num-train-epochs {num_train_epochs:g}; expected more than 0")
    _check_output(output, resume_from_checkpoint)
    checkpoint = open_checkpoint(student)
    arguments = _training_arguments(
        set or [],
        device,
        output_dir=str(output),
        learning_rate=learning_rate,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        **_batch_arguments(batch_size, micro_batch_size),
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        seed=seed,
        logging_steps=logging_steps,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        report_to=report_to,
    )
    if arguments.fp16 or checkpoint.dtype_name(dtype) == "float16":
        raise OptionError("float16 loses small gradients in the loss head", "use --bf16, or --dtype float32")
    needs = {name: Need(term.kl != 0 or term.advantage != 0, term.advantage != 0) for name, term in terms.items()}
    selection = select(cache, needs, checkpoint.identity.digest, scoring, response_set or ())
    tokenizer = _check_student(checkpoint, cache, selection)

    origin = {
        "objective": objective,
        "terms": {name: term._asdict() for name, term in terms.items()},
        "plausibility": plausibility,
        "student": vars(checkpoint.identity),
        "scoring": selection.scoring.id if selection.scoring else None,
        "responses": {name: found.id for name, found in selection.sets.items()},
    }
    _check_origin(output, resume_from_checkpoint, origin)
    if save_steps:
        _write_record(output, origin)

    set_seed(seed)
    model = checkpoint.load(checkpoint.dtype_name(dtype), torch.device("cpu"))
    attach_distill_head(model)
    if packing != "none":
        allow_packing(model)
    examples = TrainingExamples(selection.parts(needs))
    trainer = DistillTrainer(
        terms=list(terms.items()),
        plausibility=plausibility,
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=partial(collate, packing=packing),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True if resume_from_checkpoint == "last" else resume_from_checkpoint)
    # Trainer has set the end of a text to the tokenizer's; a student's answer ends with its turn.
    model.generation_config.eos_token_id = next(iter(selection.sets.values())).info.turn_end
    trainer.save_model(str(output))

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = DistillReport(
        objective=objective,
        output=str(output),
        scoring=selection.scoring.id if selection.scoring else None,
        responses={name: found.id for name, found in selection.sets.items()},
        examples=len(examples),
        steps=trainer.state.global_step,
        first_loss=logs[0]["loss"],
        last_loss=logs[-1]["loss"],
        tokens_per_second=trainer.tokens_per_second,
        seconds=time.perf_counter() - started,
        warnings=trainer.warnings,
    )
    if trainer.is_world_process_zero():
        _write_record(
            output,
            origin
            | {
                "examples": report.examples,
                "steps": report.steps,
                "seconds": report.seconds,
                "tokens_per_second": report.tokens_per_second,
                "training": {
                    "learning_rate": arguments.learning_rate,
                    "lr_scheduler_type": SchedulerType(arguments.lr_scheduler_type).value,
                    "batch_size": batch_size,
                    "packing": packing,
                    "seed": arguments.seed,
                },
                "versions": {"python": platform.python_version()}
                | {name: version(name) for name in ("adpa", "torch", "transformers")},
                "warnings": report.warnings,
                "student_before": trainer.student_before,
                "losses": logs,
            },
        )
    return report


def _check_output(output: Path, resume_from_checkpoint: str | None) -> None:
    check_writable("--output", output)
    contents = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if contents and resume_from_checkpoint is None:
        raise OptionError(
            f"--output {output}: not empty, found {contents[0]}",
            "name another directory, or go on with --resume-from-checkpoint last",
        )
    if resume_from_checkpoint == "last" and not any(name.startswith("checkpoint-") for name in contents):
        raise OptionError(f"--resume-from-checkpoint last: found no checkpoint in {output}", "start without it")


def _batch_arguments(batch_size: int, micro_batch_size: int | None) -> dict[str, int]:
    """Trainer's names for examples per optimizer step over all ranks, and examples at a time."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    per_rank, rest = divmod(batch_size, ranks)
    if batch_size < 1 or rest:
        raise OptionError(f"--batch-size {batch_size} on {ranks} ranks; expected a multiple of {ranks}")
    micro = micro_batch_size or max(size for size in (1, 2, 3, 4) if per_rank % size == 0)
    if micro < 1 or per_rank % micro:
        raise OptionError(
            f"--micro-batch-size {micro} does not divide the {per_rank} examples of a step and rank",
            "choose one that does",
        )
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": per_rank // micro}


def _training_arguments(overrides: Sequence[str], device: str, **arguments: Any) -> TrainingArguments:
    known = {field.name for field in fields(TrainingArguments)}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in known:
            raise OptionError(f"--set {override}; expected key=value with a field of transformers.TrainingArguments")
        arguments[key] = as_number(yaml.safe_load(value))
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {device}; expected auto, cpu or cuda", "choose a GPU by CUDA_VISIBLE_DEVICES")
    use_cpu = resolve_device(device).type == "cpu"
    try:
        made = TrainingArguments(
            **arguments,
            use_cpu=use_cpu,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,  # it would hide a loss that is not finite
            disable_tqdm=not sys.stderr.isatty(),
        )
    except (ValueError, TypeError) as error:
        raise OptionError(f"transformers.TrainingArguments refuses the options: {error}") from error
    made._n_gpu = min(made.n_gpu, 1)  # one process drives one GPU: no DataParallel
    return made


def _check_student(checkpoint: Checkpoint, cache: Location, selection: Selection) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, after checking that the student's agrees with it."""
    info = next(iter(selection.sets.values())).info
    tokenizer = read_tokenizer(cache, info.tokenizer)
    check_same_vocabulary(tokenizer, checkpoint.tokenizer, "the cache's teacher", checkpoint.name)
    sequences = [sequence for found in selection.sets.values() for sequence in found.sequences()]
    checkpoint.check_positions([len(sequence) for sequence in sequences])
    checkpoint.check_ids(max(int(max(s.prompt_ids.max(), s.response_ids.max())) for s in sequences))
    return tokenizer


def _write_record(output: Path, record: Mapping[str, Any]) -> None:
    write_file(output / RECORD, json.dumps(record, indent=2).encode() + b"\n")


def _check_origin(output: Path, resume_from_checkpoint: str | None, origin: Mapping[str, Any]) -> None:
    """A run goes on with the objective, the student and the data it began with."""
    if resume_from_checkpoint is None:
        return
    run = output if resume_from_checkpoint == "last" else Path(resume_from_checkpoint).parent
    try:
        begun = json.loads((run / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--resume-from-checkpoint {resume_from_checkpoint}: found no {RECORD} of its run in {run}",
            "name a checkpoint that adpa distill wrote",
        ) from error
    for field, value in origin.items():
        found, expected = (
            {key: entry for key, entry in side.items() if key != "name"} if field == "student" else side
            for side in (begun.get(field), value)
        )
        if found != expected:
            raise OptionError(
                f"--resume-from-checkpoint {resume_from_checkpoint}: its run has the {field} {found}; "
                f"this one has {expected}",
                "go on with the same options, or start anew in another --output",
            )
