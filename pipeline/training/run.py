"""The steps of a training run: open its sources, find its start, load the student, train, save.

Every rank takes every step.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from adpa.data.batches import collate
from adpa.data.cache.choice import made_from
from adpa.data.cache.held_out_sets import held_out_ids, select_held_out
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseName, read_response_sets
from adpa.data.cache.selection import Need, Selection, select
from adpa.data.cache.tokenizers import read_tokenizer
from adpa.data.sequences import Packing
from adpa.data.vocabulary import check_same_vocabulary
from adpa.errors import OptionError
from adpa.pipeline.models.attention import check_place, runs_on_cpu, switch_attention
from adpa.pipeline.models.attention_mask import leave_out_padding_mask
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.launcher import this_rank
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.models.padding import check_padding
from adpa.pipeline.options import DtypeName
from adpa.pipeline.training.callbacks import EarlyStop, KeepEnds, name_failing_trackers
from adpa.pipeline.training.examples import Examples, divide_examples
from adpa.pipeline.training.inputs import find_needs
from adpa.pipeline.training.log_lines import Bar, LogLines
from adpa.pipeline.training.lora import add_adapters, load_base
from adpa.pipeline.training.lora_settings import LoraSettings
from adpa.pipeline.training.model_sharding import check_shards, loading_whole, sharding_name
from adpa.pipeline.training.objectives import ObjectiveName, TermWeights
from adpa.pipeline.training.ranks import check_agreement, on_all_ranks
from adpa.pipeline.training.run_directory import LAST, check_contents, claimed, earlier_ids, find_start, write_record
from adpa.pipeline.training.run_warnings import length_warnings, unused_warnings
from adpa.pipeline.training.student import attach_distill_head
from adpa.pipeline.training.trainer import DistillTrainer
from adpa.pipeline.training.training_arguments import TRAINING
from adpa.pipeline.training.validation import lost_best
from adpa.pipeline.training.validation_settings import ValidationSettings

logger = logging.getLogger(__name__)


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
        validation: the held-out examples; None for none.
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
    validation: ValidationSettings | None
    arguments: TrainingArguments
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def needs(self) -> dict[ResponseName, Need]:
        """The signals that the terms need of each response set."""
        return find_needs(self.terms)


@dataclass(frozen=True)
class Sources:
    """The student before training, its data, and the teacher's tokenizer.

    Attributes:
        checkpoint: the student.
        selection: its response sets and their scoring.
        tokenizer: the teacher's.
        held_out: the response sets of a second data set that it is evaluated on, if there is one.
        examples: the examples that it is trained on, and those that it is evaluated on.
    """

    checkpoint: Checkpoint
    selection: Selection
    tokenizer: PreTrainedTokenizerBase
    held_out: Selection | None
    examples: Examples

    @property
    def data(self) -> str:
        """The data that the response sets were made from, in words."""
        return made_from(self.selection, self.selection.newest_of)


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
        held_out = earlier.pop("held out", None) or {}
        digest, data = checkpoint.identity.digest, run.validation and run.validation.data
        others = held_out_ids(data, list(read_response_sets(cache)), response_sets) if data else ()
        selection = select(cache, run.needs, digest, scoring, response_sets, earlier, others)
        tokenizer = _check_student(checkpoint, cache, selection)
        second = select_held_out(cache, data, run.needs, checkpoint.identity, selection, held_out) if data else None
        if second is not None:
            _check_student(checkpoint, cache, second)
        return Sources(
            checkpoint, selection, tokenizer, second, divide_examples(run.needs, selection, second, run.validation)
        )

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
    selection, held_out = sources.selection, sources.held_out
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
        "validation": run.validation and run.validation.record | {"responses": held_out and held_out.ids["responses"]},
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
    examples = len(sources.examples.trained)
    warnings = unused_warnings(run.terms, chosen, usual) + length_warnings(examples, chosen, usual)
    warnings += sources.examples.warnings
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
        train_dataset=sources.examples.trained,
        eval_dataset=sources.examples.held_out,
        data_collator=partial(collate, packing=run.packing),
        packing=run.packing,
        processing_class=sources.tokenizer,
    )
    trainer.warnings += warnings
    name_failing_trackers(trainer.callback_handler.callbacks)
    turn_end = next(iter(sources.selection.sets.values())).info.turn_end
    trainer.add_callback(KeepEnds(turn_end, sources.checkpoint.eos_token_ids, student.model.generation_config))
    if run.validation and run.validation.patience:
        trainer.add_callback(EarlyStop(run.validation.patience))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LogLines(trainer.terms, sources.examples.describe()))
    if not run.arguments.disable_tqdm:
        trainer.add_callback(Bar)
    if run.arguments.save_strategy != SaveStrategy.NO and this_rank() == 0:
        write_record(run.output, origin)  # a killed run can only resume with it
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if lost := lost_best(trainer.args, trainer.state):
        trainer.warnings.append(lost)
        if this_rank() == 0:
            logger.warning(lost)
    return trainer
