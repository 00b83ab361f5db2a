"""Stage two: trains a student from the signals in a cache."""

import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy, align_special_tokens
from typing_extensions import Doc

from adpa.data.batches import Packing, TrainingExamples, collate
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseName
from adpa.data.cache.selection import Need, Selection, select
from adpa.data.summary import PLAUSIBLE
from adpa.data.vocabulary import check_same_vocabulary, read_tokenizer
from adpa.errors import OptionError
from adpa.pipeline.models.attention_mask import leave_out_padding_mask
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.launcher import number_of_ranks, this_rank
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.options import DtypeName
from adpa.pipeline.training.lora import add_adapters, load_base, lora_settings, merge_adapters
from adpa.pipeline.training.model_sharding import check_sharding, check_shards, loading_whole, sharding_name
from adpa.pipeline.training.objectives import ObjectiveName, check_plausibility, objective_terms
from adpa.pipeline.training.ranks import check_agreement, on_all_ranks
from adpa.pipeline.training.run_directory import check_output, find_start, write_record
from adpa.pipeline.training.student import attach_distill_head
from adpa.pipeline.training.trainer import DistillTrainer
from adpa.pipeline.training.training_arguments import TRAINING, batch_arguments, make_training_arguments

ADAPTER = "adapter"

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
        trained_parameters: numbers that were trained.
        compute_dtype: dtype of the matrix products.
        weights_dtype: dtype of the weights in training.
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
    trained_parameters: int
    compute_dtype: str
    weights_dtype: str
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
        Doc("Responses with the KL term of kd (default: chosen) or the advantage term of adpa (default: sampled)."),
    ] = None,
    kl_weight: Annotated[
        float | None, Doc("α, the weight of the KL terms; default: 1 for kd and dckd, 0 for adpa.")
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
    lora_rank: Annotated[
        int | None,
        Doc("Train low-rank adapters (LoRA) of this rank instead of the weights, with alpha = 2 · rank; 16 is usual."),
    ] = None,
    lora_target: Annotated[
        str | None,
        Doc("Linear layers that get adapters, such as q_proj,v_proj; default: all-linear, every one but the head."),
    ] = None,
    load_in_4bit: Annotated[
        bool,
        Doc("QLoRA: hold the layers' own weights in 4 bits (NF4, double quantization) while adapters are trained."),
    ] = False,
    learning_rate: Annotated[float, Doc("Peak learning rate; adapters want about ten times as much.")] = 2e-5,
    num_train_epochs: Annotated[float, Doc("Passes over the examples.")] = 1.0,
    max_steps: Annotated[int, Doc("Optimizer steps; outranks the epochs unless −1.")] = -1,
    batch_size: Annotated[int, Doc("Examples of an optimizer step, over all ranks.")] = 32,
    micro_batch_size: Annotated[
        int | None, Doc("Examples that fit in memory at a time; default: 4, or what divides the batch.")
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
    bf16: Annotated[
        bool | None, Doc("Compute in bfloat16, with weights in --dtype; default: on a GPU that has it.")
    ] = None,
    dtype: Annotated[DtypeName, Doc("Dtype of the weights in training; auto is the checkpoint's own.")] = "float32",
    device: Annotated[str, Doc("cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    seed: Annotated[int, Doc("Seed of the order of the examples, and of dropout.")] = 0,
    logging_steps: Annotated[int, Doc("Steps between two logs, each with a look at 32 examples.")] = 10,
    save_steps: Annotated[int, Doc("Steps between two checkpoints; 0 saves only the trained student.")] = 0,
    resume_from_checkpoint: Annotated[
        str | None,
        Doc("A checkpoint directory to go on from, or last for the newest one in --output, if there is one."),
    ] = None,
    report_to: Annotated[str, Doc("Experiment tracker: none, wandb, tensorboard, …")] = "none",
    set: Annotated[list[str] | None, Doc("key=value of any transformers.TrainingArguments field; repeatable.")] = None,
) -> DistillReport:
    """Train a student from the signals in a cache.

    The trained student is an ordinary checkpoint, with the teacher's tokenizer and chat template, and with
    adpa.json, which says how it was made. With --lora-rank the adapters are merged into the weights, in --dtype, and
    lie beside them in the folder adapter too.

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
    if not 0 < num_train_epochs < inf:
        raise OptionError(f"--num-train-epochs {num_train_epochs:g}; expected more than 0")
    for option, number in (
        ("--learning-rate", learning_rate),
        ("--warmup-steps", warmup_steps),
        ("--weight-decay", weight_decay),
        ("--max-grad-norm", max_grad_norm),
        ("--save-steps", save_steps),
    ):
        if not 0 <= number < inf:
            raise OptionError(f"{option} {number:g}; expected 0 or more")
    lora = lora_settings(lora_rank, lora_target, load_in_4bit)
    arguments = make_training_arguments(
        set or [],
        device,
        output_dir=str(output),
        learning_rate=learning_rate,
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        **batch_arguments(batch_size, micro_batch_size),
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
    check_sharding(arguments)
    needs = {name: Need(term.kl != 0 or term.advantage != 0, term.advantage != 0) for name, term in terms.items()}

    def look() -> tuple[Checkpoint, Selection, PreTrainedTokenizerBase]:
        check_output(output, resume_from_checkpoint)
        checkpoint = open_checkpoint(student)
        if checkpoint.dtype_name(dtype) == "float16":
            raise OptionError("float16 loses small gradients in the loss head", "use --bf16, or --dtype float32")
        selection = select(cache, needs, checkpoint.identity.digest, scoring, response_set or ())
        return checkpoint, selection, _check_student(checkpoint, cache, selection)

    checkpoint, selection, tokenizer = on_all_ranks(look)
    origin = {
        "objective": objective,
        "terms": {name: term._asdict() for name, term in terms.items()},
        "plausibility": plausibility,
        "student": vars(checkpoint.identity),
        "scoring": selection.scoring.id if selection.scoring else None,
        "responses": {name: found.id for name, found in selection.sets.items()},
        "lora": lora and lora.record,
        "training": {name: value for name, value in arguments.to_dict().items() if name in TRAINING}
        | {"batch_size": batch_size, "dtype": dtype},
        "sharding": sharding_name(arguments),
    }

    def look_back() -> Path | None:
        start = find_start(output, resume_from_checkpoint, origin)
        if start is not None:
            check_shards(start, arguments)
        return start

    start = on_all_ranks(look_back)
    local = {"local_rank": None, "disable_tqdm": None}  # ranks may have a terminal or none
    check_agreement(origin | {"packing": packing, "checkpoint to go on from": start} | arguments.to_dict() | local)
    set_seed(seed)
    weights_dtype = checkpoint.dtype_name(dtype)
    compute_dtype = "bfloat16" if arguments.bf16 else weights_dtype
    with loading_whole(arguments):
        if lora is None:
            model = checkpoint.load(weights_dtype, torch.device("cpu"))
        else:
            model = load_base(checkpoint, lora, weights_dtype, compute_dtype, arguments.device)
    attach_distill_head(model)
    if packing == "none":
        leave_out_padding_mask(model)
    else:
        allow_packing(model)
    trained = model if lora is None else add_adapters(model, lora)
    trained_parameters = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    examples = TrainingExamples(selection.parts(needs))
    trainer = DistillTrainer(
        terms=list(terms.items()),
        plausibility=plausibility,
        model=trained,
        args=arguments,
        train_dataset=examples,
        data_collator=partial(collate, packing=packing),
        packing=packing,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.save_strategy != SaveStrategy.NO and this_rank() == 0:
        write_record(output, origin)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    # Trainer has set the end of a text to the tokenizer's; a student's answer ends with its turn.
    model.generation_config.eos_token_id = next(iter(selection.sets.values())).info.turn_end
    if lora is None:
        trainer.save_student(output)
    else:
        trainer.save_student(output / ADAPTER)
        if this_rank() == 0:
            with loading_whole(arguments):
                merged = merge_adapters(checkpoint, output / ADAPTER, weights_dtype)
            align_special_tokens(merged, tokenizer)
            merged.generation_config = model.generation_config
            merged.save_pretrained(output)
            tokenizer.save_pretrained(output)

    # DeepSpeed has weights of its own.
    weights_dtype = str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = DistillReport(
        objective=objective,
        output=str(output),
        scoring=selection.scoring.id if selection.scoring else None,
        responses={name: found.id for name, found in selection.sets.items()},
        examples=len(examples),
        trained_parameters=trained_parameters,
        compute_dtype=compute_dtype,
        weights_dtype=weights_dtype,
        steps=trainer.state.global_step,
        first_loss=logs[0]["loss"],
        last_loss=logs[-1]["loss"],
        tokens_per_second=trainer.tokens_per_second,
        seconds=time.perf_counter() - started,
        warnings=trainer.warnings,
    )
    if this_rank() == 0:
        write_record(
            output,
            origin
            | {
                "examples": report.examples,
                "trained_parameters": report.trained_parameters,
                "compute_dtype": compute_dtype,
                "weights_dtype": weights_dtype,
                "steps": report.steps,
                "seconds": report.seconds,
                "tokens_per_second": report.tokens_per_second,
                "packing": packing,
                "ranks": number_of_ranks(),
                "versions": {"python": platform.python_version()}
                | {name: version(name) for name in ("adpa", "torch", "transformers", *(lora.packages if lora else ()))},
                "warnings": report.warnings,
                "student_before": trainer.student_before,
                "losses": logs,
            },
        )
    return report


def _check_student(checkpoint: Checkpoint, cache: Location, selection: Selection) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, after checking that the student's agrees with it."""
    info = next(iter(selection.sets.values())).info
    tokenizer = read_tokenizer(cache, info.tokenizer)
    check_same_vocabulary(tokenizer, checkpoint.tokenizer, "the cache's teacher", checkpoint.name)
    sequences = [sequence for found in selection.sets.values() for sequence in found.sequences()]
    checkpoint.check_positions([len(sequence) for sequence in sequences])
    checkpoint.check_ids(max(int(max(s.prompt_ids.max(), s.response_ids.max())) for s in sequences))
    return tokenizer
