"""Stage two: trains a student from the signals in a cache."""

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, Protocol, cast, overload

from typing_extensions import Doc

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseName
from adpa.data.sequences import Packing
from adpa.data.summary import PLAUSIBLE
from adpa.errors import OptionError
from adpa.pipeline.models.attention import check_attention, check_packing
from adpa.pipeline.option_checks import check_choices, check_not_empty, takes_options
from adpa.pipeline.options import AttnImplementationOption, DtypeName, Group, PathOrName, TrustRemoteCodeOption
from adpa.pipeline.training.batch_size import batch_arguments
from adpa.pipeline.training.distill_plan import DistillPlan
from adpa.pipeline.training.lora_settings import lora_settings
from adpa.pipeline.training.objectives import ObjectiveName, objective_terms
from adpa.pipeline.training.optimizers import BUILT_IN, check_optimizer
from adpa.pipeline.training.overrides import read_overrides
from adpa.pipeline.training.ranges import check_ranges
from adpa.pipeline.training.run_directory import check_output
from adpa.pipeline.training.schedules import SchedulerName, check_schedule
from adpa.pipeline.training.trackers import read_trackers
from adpa.pipeline.training.validation_settings import validation_arguments, validation_settings

if TYPE_CHECKING:
    from adpa.pipeline.training.run import Run, Sources, Student
    from adpa.pipeline.training.trainer import DistillTrainer

# Options that Trainer has, too, by the same name.
TRAINER_HAS = (
    "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "gradient_checkpointing", "bf16", "seed", "logging_steps",
)  # fmt: skip


@dataclass(frozen=True)
class DistillReport:
    """The result of ``distill``.

    Attributes:
        objective: name of the objective.
        output: directory of the trained student.
        scoring: id of the scoring that it learned from; None for sft.
        responses: id of each response set, by name.
        data: the data that they were made from, and when; and of how many versions they are the newest.
        examples: number of preference pairs.
        trained_parameters: count of the numbers that were trained.
        compute_dtype: dtype of the matrix products.
        weights_dtype: dtype of the weights in training.
        steps: optimizer steps in all.
        first_loss: loss at the first log.
        last_loss: loss at the last log.
        tokens_per_second: tokens of prompts and responses, see ``DistillTrainer.tokens_per_second``.
        seconds: wall-clock time.
        warnings: warnings of the run.
        validation_examples: number of held-out examples.
        validation: the losses on them of the trained student, by their keys in a log; empty without any.
        best_step: the step with the lowest loss on them.
        stopped_early: whether the run ended before its last step, because this loss rose.
    """

    objective: ObjectiveName
    output: str
    scoring: str | None
    responses: dict[str, str]
    data: str
    examples: int
    trained_parameters: int
    compute_dtype: str
    weights_dtype: str
    steps: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    seconds: float
    warnings: list[str]
    validation_examples: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped_early: bool = False


Options = ParamSpec("Options")


class Distill(Protocol[Options]):
    """The type of ``distill``: what it returns depends on ``dry_run``."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # mypy does not see that only True fits the first
        self, *arguments: Any, dry_run: Literal[True], **options: Any
    ) -> DistillPlan: ...
    @overload
    def __call__(self, *arguments: Options.args, **options: Options.kwargs) -> DistillReport: ...


def _typed(function: Callable[Options, DistillReport | DistillPlan]) -> Distill[Options]:
    return cast(Distill[Options], function)


@_typed
@takes_options
def distill(
    objective: Annotated[ObjectiveName, Doc("The loss to minimise: sft, kd, dckd or adpa."), Group.DECIDE],
    student: Annotated[
        PathOrName, Doc("The small model to train: a directory, or org/name[@revision] of the Hub."), Group.DECIDE
    ],
    cache: Annotated[
        Location, Doc("Directory of the teacher-signal cache, or a URL such as s3://bucket/folder."), Group.DECIDE
    ],
    output: Annotated[Path, Doc("Directory for the trained student; it must be empty."), Group.DECIDE],
    on: Annotated[
        ResponseName | None,
        Doc("Responses with the KL term of kd (default: chosen) or the advantage term of adpa (default: sampled)."),
        Group.LOSS,
    ] = None,
    kl_weight: Annotated[
        float | None, Doc("α, the weight of the KL terms; default: 1 for kd and dckd, 0 for adpa."), Group.LOSS
    ] = None,
    advantage_weight: Annotated[float, Doc("γ, the weight of the advantage term of adpa."), Group.LOSS] = 0.5,
    plausibility: Annotated[
        float,
        Doc(
            "Keep a positive advantage only if the teacher's probability of the token is at least this. Without it, a "
            "large γ pulls the student towards tokens that both large models find implausible. 0 is the published form."
        ),
        Group.LOSS,
    ] = PLAUSIBLE,
    scoring: Annotated[
        str | None,
        Doc("Scoring to learn from if several fit, by its id, the beginning of its id, or its folder."),
        Group.SIGNALS,
    ] = None,
    response_set: Annotated[
        list[str] | None,
        Doc(
            "Response set to train on if several fit, by its name and id, the beginning of its id, or its file; "
            "repeatable."
        ),
        Group.SIGNALS,
    ] = None,
    lora_rank: Annotated[
        int | None,
        Doc("Train low-rank adapters (LoRA) of this rank instead of the weights; 16 is usual."),
        Group.ADAPTERS,
    ] = None,
    lora_alpha: Annotated[
        float | None, Doc("Adapters are scaled by alpha / rank; default: alpha = 2 · rank."), Group.ADAPTERS
    ] = None,
    lora_dropout: Annotated[float, Doc("Dropout before the adapters in training."), Group.ADAPTERS] = 0.0,
    lora_target: Annotated[
        str | None,
        Doc("Linear layers that get adapters, such as q_proj,v_proj; default: all-linear, every layer but the head."),
        Group.ADAPTERS,
    ] = None,
    load_in_4bit: Annotated[
        bool,
        Doc("QLoRA: keep the layers' own weights in 4 bits (NF4, double quantization) while adapters are trained."),
        Group.ADAPTERS,
    ] = False,
    learning_rate: Annotated[
        float, Doc("Peak learning rate; adapters need about ten times as much."), Group.TRAINING
    ] = 2e-5,
    num_train_epochs: Annotated[float, Doc("Passes over the examples."), Group.TRAINING] = 1.0,
    max_steps: Annotated[int, Doc("Optimizer steps, instead of epochs; −1 for no limit."), Group.TRAINING] = -1,
    batch_size: Annotated[int, Doc("Examples of an optimizer step, over all ranks."), Group.TRAINING] = 32,
    micro_batch_size: Annotated[
        int | None,
        Doc("Examples in memory at a time; default: the largest of 4, 3, 2 and 1 that divides the batch."),
        Group.MEMORY,
    ] = None,
    packing: Annotated[
        Packing,
        Doc(
            "none pads the sequences of a micro-batch; sequences computes them without padding; prompts also computes "
            "equal prompts once. Loss and gradient stay the same; a student that cannot be packed is refused."
        ),
        Group.MEMORY,
    ] = "none",
    lr_scheduler_type: Annotated[SchedulerName, Doc("Schedule of the learning rate."), Group.TRAINING] = "cosine",
    warmup_steps: Annotated[float, Doc("Steps of warm-up; below 1, a share of all steps."), Group.TRAINING] = 0.1,
    weight_decay: Annotated[float, Doc("Weight decay of AdamW."), Group.TRAINING] = 0.0,
    max_grad_norm: Annotated[float, Doc("Clip the gradient's norm to this."), Group.TRAINING] = 1.0,
    validation: Annotated[
        str | None,
        Doc(
            "Held-out examples: a share of the data such as 0.02, or data that the cache has already, by the name that "
            "precompute --data had, or by the ids of its response sets with commas."
        ),
        Group.VALIDATION,
    ] = None,
    eval_steps: Annotated[
        int | None,
        Doc("Steps between two evaluations on the held-out examples; default: at the end of each epoch."),
        Group.VALIDATION,
    ] = None,
    early_stopping_patience: Annotated[
        int | None, Doc("Stop after so many evaluations without a lower loss."), Group.VALIDATION
    ] = None,
    load_best_model_at_end: Annotated[
        bool, Doc("Keep the student with the lowest held-out loss instead of the last one."), Group.VALIDATION
    ] = False,
    gradient_checkpointing: Annotated[
        bool, Doc("Recompute activations in the backward pass to save memory."), Group.MEMORY
    ] = False,
    bf16: Annotated[
        bool | None,
        Doc("Compute in bfloat16, with weights in --dtype; default: on a GPU that supports it."),
        Group.MEMORY,
    ] = None,
    dtype: Annotated[
        DtypeName, Doc("Dtype of the weights in training; auto is the checkpoint's own."), Group.MEMORY
    ] = "float32",
    device: Annotated[str, Doc("cpu, cuda, or auto: a GPU if there is one."), Group.MEMORY] = "auto",
    attn_implementation: AttnImplementationOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    seed: Annotated[int, Doc("Seed of the order of the examples, and of dropout."), Group.TRAINING] = 0,
    logging_steps: Annotated[
        int, Doc("Steps between two logs; each log also measures the student on 32 examples."), Group.SAVING
    ] = 10,
    save_steps: Annotated[
        int, Doc("Steps between two checkpoints; 0 saves only the trained student."), Group.SAVING
    ] = 0,
    resume_from_checkpoint: Annotated[
        PathOrName | None,
        Doc("Checkpoint directory to resume from, or last for the newest one in --output, if it has one."),
        Group.SAVING,
    ] = None,
    report_to: Annotated[
        str, Doc("Experiment trackers: none, or wandb, tensorboard, … with commas between them."), Group.SAVING
    ] = "none",
    set: Annotated[
        list[str] | None, Doc("key=value of any transformers.TrainingArguments field; repeatable."), Group.TRAINING
    ] = None,
    dry_run: Annotated[
        bool,
        Doc("Say steps, tokens and memory, and show the first batch; train and write nothing."),
        Group.DRY_RUN,
    ] = False,
) -> DistillReport | DistillPlan:
    """Train a student from the signals in a cache.

    The trained student is an ordinary checkpoint with the teacher's tokenizer and chat template. Its adpa.json says how
    it was made. With --lora-rank the adapters are merged into the weights, in --dtype; the folder adapter has them too.
    With --dry-run nothing is trained or written; in Python the result is then a DistillPlan.

    Raises:
        AdpaError: a problem with the arguments, the cache or the student that the caller can solve.
    """
    options = dict(locals())
    started = time.perf_counter()
    check_ranges(options)
    _check_words(options)
    terms = objective_terms(objective, on, kl_weight, advantage_weight)
    lora = lora_settings(lora_rank, lora_target, load_in_4bit, lora_alpha, lora_dropout)
    of_options: dict[str, Any] = {name: options[name] for name in TRAINER_HAS} | {
        "output_dir": str(output),
        **batch_arguments(batch_size, micro_batch_size),
        "save_steps": save_steps or 500,
        "save_strategy": "steps" if save_steps else "no",
        "report_to": read_trackers(report_to),
    }
    overrides = read_overrides(set or [], options)
    validating = validation_settings(validation, eval_steps, early_stopping_patience, load_best_model_at_end)
    of_options |= validation_arguments(validating, of_options["per_device_train_batch_size"], save_steps, overrides)
    check_schedule(lr_scheduler_type, overrides.get("lr_scheduler_kwargs"), learning_rate)
    check_optimizer(overrides.get("optim", BUILT_IN), overrides.get("optim_args"))
    check_output(output, resume_from_checkpoint, cache, student)
    from adpa.pipeline.training.inputs import check_inputs, find_needs  # a client of the Hub: not for --help

    check_inputs(
        find_needs(terms), student, cache, scoring, response_set or (), validating.data if validating else None
    )

    # These import torch and transformers, which takes seconds: --help and a wrong value should not wait for them.
    from adpa.pipeline.training import results
    from adpa.pipeline.training import run as steps
    from adpa.pipeline.training.model_sharding import check_sharding
    from adpa.pipeline.training.training_arguments import make_training_arguments

    arguments = make_training_arguments(device, **of_options | overrides)
    check_sharding(arguments)
    run = steps.Run(
        objective=objective,
        terms=terms,
        plausibility=plausibility,
        lora=lora,
        dtype=dtype,
        batch_size=batch_size,
        packing=packing,
        output=output,
        resume_from_checkpoint=resume_from_checkpoint,
        validation=validating,
        arguments=arguments,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    sources = steps.open_sources(run, student, cache, scoring, response_set or ())
    origin = steps.describe_origin(run, sources)
    start = steps.find_common_start(run, origin)
    defaults = {name: each.default for name, each in inspect.signature(distill).parameters.items()}
    warnings = steps.warn_before(run, sources, start, options, defaults)
    if dry_run:
        from adpa.pipeline.training.dry_run import plan_run

        return plan_run(run, sources, start, origin, warnings)
    in_training = steps.load_student(run, sources)
    with steps.own_output(run, origin, start):
        trainer = steps.train_student(run, sources, in_training, start, origin, warnings)
        results.save_student(run, sources, in_training, trainer)
        report = _report(run, sources, in_training, origin, trainer, time.perf_counter() - started)
        results.write_result(run, sources, in_training, origin, asdict(report), trainer, options, defaults)
    return report


def _report(
    run: "Run",
    sources: "Sources",
    in_training: "Student",
    origin: Mapping[str, Any],
    trainer: "DistillTrainer",
    seconds: float,
) -> DistillReport:
    return DistillReport(
        objective=run.objective,
        output=str(run.output),
        scoring=origin["scoring"],
        responses=origin["responses"],
        data=sources.data,
        examples=len(trainer.examples),
        trained_parameters=in_training.trained_parameters,
        compute_dtype=in_training.compute_dtype,
        weights_dtype=in_training.weights_dtype,
        steps=trainer.state.global_step,
        first_loss=trainer.losses[0]["loss"],
        last_loss=trainer.losses[-1]["loss"],
        tokens_per_second=trainer.tokens_per_second,
        seconds=seconds,
        warnings=trainer.warnings,
        **trainer.evaluation,
    )


def _check_words(options: Mapping[str, Any]) -> None:
    """Checks the options of ``distill`` that are names, by their own names."""
    names = ("student", "scoring", "resume_from_checkpoint")
    check_not_empty({f"--{name.replace('_', '-')}": options[name] for name in names})
    packing, dtype, device, attention = (
        options[name] for name in ("packing", "dtype", "device", "attn_implementation")
    )
    check_choices({"--packing": (packing, Packing), "--dtype": (dtype, DtypeName)})
    check_attention(attention)
    check_packing(attention, packing)
    if dtype == "float16":
        raise OptionError("--dtype float16 loses small gradients in the loss head", "use --bf16, or --dtype float32")
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device {device}; expected auto, cpu or cuda", "choose a GPU by CUDA_VISIBLE_DEVICES")
