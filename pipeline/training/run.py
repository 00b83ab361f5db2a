"""The steps of a training run: open its sources, find its start, load the student, train, save.

Every rank takes every step.
"""

import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy, align_special_tokens

from adpa.data.batches import TrainingExamples, collate
from adpa.data.cache.choice import made_from
from adpa.data.cache.files import write_file
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseName
from adpa.data.cache.selection import Need, Selection, select
from adpa.data.cache.tokenizers import read_tokenizer
from adpa.data.sequences import Packing
from adpa.data.vocabulary import check_same_vocabulary
from adpa.errors import OptionError
from adpa.pipeline.models.attention import check_place, runs_on_cpu, switch_attention
from adpa.pipeline.models.attention_mask import leave_out_padding_mask
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.launcher import number_of_ranks, this_rank
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.models.padding import check_padding
from adpa.pipeline.options import DtypeName
from adpa.pipeline.training.inputs import find_needs
from adpa.pipeline.training.lora import add_adapters, load_base, merge_adapters
from adpa.pipeline.training.lora_settings import LoraSettings
from adpa.pipeline.training.model_card import CARD, card_facts, write_card
from adpa.pipeline.training.model_sharding import check_shards, loading_whole, sharding_name
from adpa.pipeline.training.objectives import ObjectiveName, TermWeights
from adpa.pipeline.training.ranks import check_agreement, on_all_ranks
from adpa.pipeline.training.run_directory import LAST, check_contents, claimed, earlier_ids, find_start, write_record
from adpa.pipeline.training.run_warnings import length_warnings, unused_warnings
from adpa.pipeline.training.student import attach_distill_head
from adpa.pipeline.training.trainer import DistillTrainer
from adpa.pipeline.training.training_arguments import TRAINING

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
# The fields of a report that adpa.json has too.
REPORTED = (
    "data", "examples", "trained_parameters", "compute_dtype", "weights_dtype", "steps", "seconds", "tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The options of a run, checked.

    Attributes:
        objective: name of the objective.
        terms: its terms by response set.
        plausibility: see ``plausible_advantages``.
        lora: the adapters; None to train all weights.
        dtype: dtype of the weights.
        batch_size: examples of an optimizer step, over all ranks.
        packing: how a micro-batch places its sequences.
        output: directory of the trained student.
        resume_from_checkpoint: see ``find_start``.
        arguments: Trainer's arguments.
        attn_implementation: see ``Checkpoint``.
        trust_remote_code: see ``Checkpoint``.
    """

    objective: ObjectiveName
    terms: Mapping[ResponseName, TermWeights]
    plausibility: float
    lora: LoraSettings | None
    dtype: DtypeName
    batch_size: int
    packing: Packing
    output: Path
    resume_from_checkpoint: str | None
    arguments: TrainingArguments
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def needs(self) -> dict[ResponseName, Need]:
        """The signals that the terms need of each response set."""
        return find_needs(self.terms)


@dataclass(frozen=True)
class Sources:
    """The student before training, its data, and the teacher's tokenizer."""

    checkpoint: Checkpoint
    selection: Selection
    tokenizer: PreTrainedTokenizerBase

    @property
    def data(self) -> str:
        """The data that the response sets were made from, in words."""
        return made_from(self.selection, self.selection.newest_of)

    @property
    def ends(self) -> list[int]:
        """The ids that end a response: the end of a turn, and what ended the student's answers before training."""
        turn_end = next(iter(self.selection.sets.values())).info.turn_end
        return list(dict.fromkeys([turn_end, *self.checkpoint.eos_token_ids]))


@dataclass(frozen=True)
class Student:
    """The student in training.

    Attributes:
        model: the student, with the distill head.
        trained: ``model``, or the PeftModel around it.
        trained_parameters: count of the numbers that are trained.
        compute_dtype: dtype of the matrix products.
        attention: the name in transformers of what computes its attention.
    """

    model: PreTrainedModel
    trained: Any
    trained_parameters: int
    compute_dtype: str
    attention: str

    @property
    def weights_dtype(self) -> str:
        """Dtype of the weights now: DeepSpeed may have changed it."""
        return str(self.model.get_output_embeddings().weight.dtype).removeprefix("torch.")


def open_sources(run: Run, student: str, cache: Location, scoring: str | None, response_sets: Sequence[str]) -> Sources:
    """Opens the student and selects its data.

    Args:
        run: the run.
        student: a directory, or org/name[@revision] of the Hub.
        cache: the cache's directory.
        scoring: the scoring to learn from, as ``select`` takes it.
        response_sets: the response sets to train on, as ``select`` takes them.

    Raises:
        AdpaError: an error of ``open_checkpoint`` or ``select``, or a student that does not fit the data.
    """

    def open_on_this_rank() -> Sources:
        # The CPU loads and checks the student; load_student switches to an attention that needs a GPU.
        attention = run.attn_implementation if runs_on_cpu(run.attn_implementation) else None
        checkpoint = open_checkpoint(student, attn_implementation=attention, trust_remote_code=run.trust_remote_code)
        if checkpoint.dtype_name(run.dtype) == "float16":
            raise OptionError("float16 loses small gradients in the loss head", "use --bf16, or --dtype float32")
        earlier = earlier_ids(run.output, run.resume_from_checkpoint)
        selection = select(cache, run.needs, checkpoint.identity.digest, scoring, response_sets, earlier)
        return Sources(checkpoint, selection, _check_student(checkpoint, cache, selection))

    return on_all_ranks(open_on_this_rank)


def _check_student(checkpoint: Checkpoint, cache: Location, selection: Selection) -> PreTrainedTokenizerBase:
    """Checks that the student fits the data; returns the teacher's tokenizer."""
    info = next(iter(selection.sets.values())).info
    tokenizer = read_tokenizer(cache, info.tokenizer, checkpoint.trust_remote_code)
    check_same_vocabulary(tokenizer, checkpoint.tokenizer, "the cache's teacher", checkpoint.name)
    sequences = [sequence for responses in selection.sets.values() for sequence in responses.sequences()]
    checkpoint.check_positions([len(sequence) for sequence in sequences])
    checkpoint.check_ids(max(int(max(s.prompt_ids.max(), s.response_ids.max())) for s in sequences))
    return tokenizer


def describe_origin(run: Run, sources: Sources) -> dict[str, Any]:
    """The beginning of adpa.json: everything that a resumed run must have in common with its first part."""
    selection = sources.selection
    arguments = {name: value for name, value in run.arguments.to_dict().items() if name in TRAINING}
    return {
        "objective": run.objective,
        "terms": {name: term._asdict() for name, term in run.terms.items()},
        "plausibility": run.plausibility,
        "student": vars(sources.checkpoint.identity),
        **selection.ids,
        "lora": run.lora and run.lora.record,
        "training": arguments | {"batch_size": run.batch_size, "dtype": run.dtype},
        "sharding": sharding_name(run.arguments),
    }


def find_common_start(run: Run, origin: Mapping[str, Any]) -> Path | None:
    """The checkpoint to resume from, if any, after checking that all ranks do the same run.

    Raises:
        OptionError: an error of ``find_start`` or ``check_shards``, or ranks that differ.
    """

    def find_on_this_rank() -> Path | None:
        start = find_start(run.output, run.resume_from_checkpoint, origin)
        if start is not None:
            check_shards(start, run.arguments)
        return start

    start = on_all_ranks(find_on_this_rank)
    view = {**origin, "packing": run.packing, "checkpoint to resume from": start, **run.arguments.to_dict()}
    local = ("local_rank", "disable_tqdm")  # some ranks have a terminal
    check_agreement({name: value for name, value in view.items() if name not in local})
    return start


def warn_before(
    run: Run, sources: Sources, start: Path | None, chosen: Mapping[str, Any], usual: Mapping[str, Any]
) -> list[str]:
    """Says what in a run's options does little or nothing; returns these warnings.

    Args:
        run: the run.
        sources: its sources.
        start: the checkpoint that it resumes from.
        chosen: the options of ``distill``, by name.
        usual: their defaults.
    """
    examples = len(TrainingExamples(sources.selection.training_sets(run.needs)))
    warnings = unused_warnings(run.terms, chosen, usual) + length_warnings(examples, chosen, usual)
    if run.resume_from_checkpoint == LAST and start is None:
        warnings.append(
            f"--resume-from-checkpoint {LAST}: no checkpoint in {run.output}; the run begins at its first step"
        )
    if this_rank() == 0:
        for warning in warnings:
            logger.warning(warning)
    return warnings


def load_student(run: Run, sources: Sources) -> Student:
    """Loads the student, whole on every rank, and prepares it for the loss.

    Raises:
        ModelError: the student cannot be loaded, or not trained in this way.
        OptionError: it lacks a layer that ``--lora-target`` names, or the device or dtype cannot compute its attention.
    """
    set_seed(run.arguments.seed)
    checkpoint, attention = sources.checkpoint, run.attn_implementation
    dtype = checkpoint.dtype_name(run.dtype)
    compute_dtype = "bfloat16" if run.arguments.bf16 else dtype
    check_place(attention, run.arguments.device.type, compute_dtype)
    with loading_whole(run.arguments):
        if run.lora is None:
            model = checkpoint.load(dtype, torch.device("cpu"))
        else:
            model = load_base(checkpoint, run.lora, dtype, compute_dtype, run.arguments.device)
    own_attention = str(model.config._attn_implementation)
    attach_distill_head(model)
    check_padding(model)
    if attention is not None and not runs_on_cpu(attention):
        switch_attention(model, attention)
    elif run.packing == "none":
        leave_out_padding_mask(model)
    else:
        allow_packing(model)
    trained = model if run.lora is None else add_adapters(model, run.lora)
    trained_parameters = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    return Student(model, trained, trained_parameters, compute_dtype, attention or own_attention)


@contextmanager
def own_output(run: Run, origin: Mapping[str, Any], start: Path | None) -> Iterator[None]:
    """Keeps other runs out of the output, after checking that none has written to it since ``find_common_start``.

    Raises:
        OptionError: another run has the output.
    """
    with ExitStack() as stack:

        def claim() -> None:
            if this_rank() != 0:
                return
            run.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(claimed(run.output))
            check_contents(run.output, run.resume_from_checkpoint)
            if find_start(run.output, run.resume_from_checkpoint, origin) != start:
                raise OptionError(f"--output {run.output}: another run has just written to it", "see what it wrote")

        on_all_ranks(claim)
        yield


class KeepEnds(TrainerCallback):
    """Saves a student that ends its answers at the end of a turn, or at what ended them before training."""

    def __init__(self, sources: Sources, model: PreTrainedModel) -> None:
        self._ends = sources.ends
        self._settings = model.generation_config

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Sets them: Trainer has just added the tokenizer's end of text."""
        self._settings.eos_token_id = self._ends if len(self._ends) > 1 else self._ends[0]


def name_failing_trackers(trainer: DistillTrainer) -> None:
    """Makes a tracker that does not start, such as one without a login, an error of one line."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        if name := names.get(type(callback)):
            callback.on_train_begin = partial(_start_tracker, name, callback.on_train_begin)


def _start_tracker(name: str, begin: Callable[..., None], *arguments: Any, **options: Any) -> None:
    try:
        begin(*arguments, **options)
    except Exception as error:  # each tracker has errors of its own, and none of their classes is known here
        problem = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"--report-to {name}: it does not start: {problem}", "log in, or leave it out") from error


def train_student(
    run: Run,
    sources: Sources,
    student: Student,
    start: Path | None,
    origin: Mapping[str, Any],
    warnings: Sequence[str],
) -> DistillTrainer:
    """Trains the student; returns the trainer, whose logs tell how it went; its warnings begin with those so far.

    Raises:
        OptionError: a micro-batch does not fit in memory, or a tracker does not start.
        ModelError: a loss is not finite.
    """
    trainer = DistillTrainer(
        terms=list(run.terms.items()),
        plausibility=run.plausibility,
        model=student.trained,
        args=run.arguments,
        train_dataset=TrainingExamples(sources.selection.training_sets(run.needs)),
        data_collator=partial(collate, packing=run.packing),
        packing=run.packing,
        processing_class=sources.tokenizer,
    )
    trainer.warnings += warnings
    trainer.remove_callback(PrinterCallback)
    name_failing_trackers(trainer)
    trainer.add_callback(KeepEnds(sources, student.model))
    if run.arguments.save_strategy != SaveStrategy.NO and this_rank() == 0:
        write_record(run.output, origin)  # a killed run can only resume with it
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return trainer


def save_student(run: Run, sources: Sources, student: Student, trainer: DistillTrainer) -> None:
    """Writes the trained student as an ordinary checkpoint; with LoRA merged, and the adapters in a folder of it."""
    if run.lora is None:
        trainer.save_student(run.output)
        return
    trainer.save_student(run.output / ADAPTER)
    if this_rank() != 0:
        return
    (run.output / ADAPTER / CARD).unlink(missing_ok=True)  # PEFT's has nothing but the path of the base
    with loading_whole(run.arguments):
        dtype = sources.checkpoint.dtype_name(run.dtype)
        merged = merge_adapters(sources.checkpoint, run.output / ADAPTER, dtype)
    align_special_tokens(merged, sources.tokenizer)
    merged.generation_config = student.model.generation_config
    merged.save_pretrained(run.output)
    sources.tokenizer.save_pretrained(run.output)


def write_result(
    run: Run,
    sources: Sources,
    student: Student,
    origin: Mapping[str, Any],
    report: Mapping[str, Any],
    trainer: DistillTrainer,
    chosen: Mapping[str, Any],
    usual: Mapping[str, Any],
) -> None:
    """Writes adpa.json of a finished run, the curves of its logs, and its model card.

    ``chosen`` and ``usual`` are as in ``warn_before``.
    """
    if this_rank() != 0:
        return
    from adpa.pipeline.training.curves import CURVES, draw_curves  # matplotlib, which nothing before needs

    packages = ("adpa", "torch", "transformers", *(run.lora.packages if run.lora else ()))
    result = {name: report[name] for name in REPORTED} | {
        "packing": run.packing,
        "attn_implementation": student.attention,  # like packing, it changes rounding alone
        "ranks": number_of_ranks(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "warnings": trainer.warnings,
        "student_before": trainer.student_before,
        "losses": trainer.losses,
    }
    before = sources.checkpoint
    changed = {name: value for name, value in chosen.items() if value != usual[name]}
    record = {**origin, **result, **card_facts(changed, sources.selection, before.identity, before.directory)}
    write_record(run.output, record)
    write_file(run.output / CURVES, draw_curves(record).encode())
    write_card(run.output)
