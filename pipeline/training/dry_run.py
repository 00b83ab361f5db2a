"""The plan of a run: its steps, tokens, memory, and the text of its first batch. Nothing is trained or written.

Shapes: B sequences of a micro-batch, L tokens of the longest, N response tokens.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from adpa.data.batches import TrainingExamples, collate, computed_tokens
from adpa.data.pieces import texts_in_place
from adpa.data.sequences import Packing
from adpa.data.steps import StepSampler
from adpa.pipeline.training.distill_plan import (
    DistillPlan,
    Piece,
    PlannedSequence,
    TokenCount,
    TokenCounts,
)
from adpa.pipeline.training.lora import add_adapters
from adpa.pipeline.training.memory_estimate import FakeStudent, estimate_memory
from adpa.pipeline.training.run import Run, Sources
from adpa.pipeline.training.run_directory import STATE
from adpa.pipeline.training.run_warnings import number_of_steps

SHOWN_TOKENS = 40  # at each end of a prompt and of a response
CONTEXT = 8  # tokens before a text that are decoded with it: its first characters may depend on them

Step = list[list[int]]  # the micro-batches of an optimizer step, of all ranks, each as the numbers of its examples


@dataclass(frozen=True)
class MicroBatchTokens:
    """The tokens of a micro-batch by kind; see ``TokenCounts``."""

    trained: int
    prompts: int
    computed: int


def plan_run(
    run: Run, sources: Sources, start: Path | None, origin: Mapping[str, Any], warnings: Sequence[str]
) -> DistillPlan:
    """Plans a run.

    Args:
        run: the run.
        sources: its sources.
        start: the checkpoint that it resumes from.
        origin: see ``describe_origin``.
        warnings: its warnings so far.

    Raises:
        OptionError: the student lacks a layer that ``--lora-target`` names, or has a smaller one than ``--lora-rank``.
        ModelError: transformers cannot make the student from its configuration.
    """
    arguments = run.arguments
    examples = sources.examples.trained
    total = number_of_steps(len(examples), run.batch_size, arguments.num_train_epochs, arguments.max_steps)
    done = 0 if start is None else int(json.loads((start / STATE).read_text())["global_step"])
    dtype = sources.checkpoint.dtype_name(run.dtype)
    student = FakeStudent(
        sources.checkpoint.without_weights(dtype),
        arguments.device,
        partial(add_adapters, settings=run.lora) if run.lora else None,
    )
    counts = [any(term) for term in run.terms.values()]
    to_come = list(steps_between(done, total, len(examples), run))
    sizes = [[micro_batch_tokens(examples, micro, counts, run.packing) for micro in step] for step in to_come]
    turn_end = next(iter(sources.selection.sets.values())).info.turn_end
    ends = [turn_end, *sources.checkpoint.eos_token_ids]
    memory, first = None, list[PlannedSequence]()
    if to_come:
        micro_batches = zip(chain(*to_come), chain(*sizes), strict=True)
        largest, size = max(micro_batches, key=lambda one: one[1].computed)
        sequences = sum(len(examples.sizes(number)) for number in largest)
        memory = estimate_memory(student, sequences, size.computed, size.trained, run)
        first = show_batch(examples, to_come[0][0], run, sources.tokenizer, ends)
    return DistillPlan(
        objective=run.objective,
        output=str(run.output),
        scoring=origin["scoring"],
        responses=origin["responses"],
        data=sources.data,
        examples=len(examples),
        validation_examples=len(sources.examples.held_out or ()),
        steps=total,
        steps_done=done,
        steps_per_epoch=-(-len(examples) // run.batch_size),
        batch_size=run.batch_size,
        micro_batch_size=arguments.per_device_train_batch_size,
        ranks=arguments.world_size,
        parameters=sum(each.numel() for each in student.parameters),
        trained_parameters=sum(each.numel() for each in student.trained_parameters),
        compute_dtype="bfloat16" if arguments.bf16 else dtype,
        weights_dtype=dtype,
        tokens=count_tokens(sizes) if to_come else None,
        memory=memory,
        first_batch=first,
        warnings=list(warnings),
    )


def steps_between(start: int, end: int, examples: int, run: Run) -> Iterator[Step]:
    """The steps of a run, from the one after ``start`` up to ``end``: first the micro-batches of rank 0."""
    arguments = run.arguments
    micro_batch_size, micro_batches = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    ranks = arguments.world_size
    samplers = [
        StepSampler(examples, micro_batch_size, micro_batches, ranks, rank, arguments.seed) for rank in range(ranks)
    ]
    per_epoch = -(-examples // run.batch_size)
    for number in range(start, end):
        epoch, place = divmod(number, per_epoch)
        if number == start or place == 0:
            for sampler in samplers:
                sampler.set_epoch(epoch)
            of_ranks = [list(sampler) for sampler in samplers]
        mine = [one[place * micro_batches : (place + 1) * micro_batches] for one in of_ranks]
        yield [micro for of_rank in mine for micro in of_rank if micro]


def micro_batch_tokens(
    examples: TrainingExamples, numbers: Sequence[int], counts: Sequence[bool], packing: Packing
) -> MicroBatchTokens:
    """The tokens of a micro-batch.

    Args:
        examples: the examples.
        numbers: the numbers of those in the micro-batch.
        counts: of each training set, whether the loss has a term on it.
        packing: how it places its sequences.
    """
    of_examples = [examples.sizes(number) for number in numbers]
    sizes = list(chain(*of_examples))
    prompts = sum(size.prompt for size in sizes)
    computed = computed_tokens([size.prompt + size.response for size in sizes], packing)
    if packing == "prompts":  # an example's prompt is computed once
        computed -= prompts - sum(sum({size.prompt for size in example}) for example in of_examples)
    return MicroBatchTokens(sum(size.response for size in sizes if counts[size.set_number]), prompts, computed)


def count_tokens(steps: Sequence[Sequence[MicroBatchTokens]]) -> TokenCounts:
    """The tokens of steps, each with those of its micro-batches."""

    def count(name: str) -> TokenCount:
        of_steps = [sum(getattr(size, name) for size in step) for step in steps]
        return TokenCount(sum(of_steps) / len(of_steps), max(of_steps), sum(of_steps))

    return TokenCounts(count("trained"), count("prompts"), count("computed"))


def show_batch(
    examples: TrainingExamples,
    numbers: Sequence[int],
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> list[PlannedSequence]:
    """The sequences of a micro-batch as text; what is trained is read from the tensors that training gets.

    Args:
        examples: the examples.
        numbers: the numbers of those in the micro-batch.
        run: the run.
        tokenizer: the teacher's tokenizer.
        ends: the ids that end a response.
    """
    read = [examples[number] for number in numbers]
    batch = {name: tensor.numpy() for name, tensor in collate(read).items()}
    ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"].astype(bool)
    terms = list(run.terms.items())
    counts_N = np.array([any(term) for _, term in terms])[batch["set_number"]]
    trained_BL = np.zeros_like(mask_BL)
    trained_BL.reshape(-1)[batch["predicts"][counts_N] + 1] = True
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(ends)
    shown = []
    sequences = [(number, one) for number, example in enumerate(read, 1) for one in example]
    for row, (number, sequence) in enumerate(sequences):
        name, term = terms[sequence.set_number]
        length, prompt = len(sequence.tokens), len(sequence.tokens.prompt_ids)
        shown.append(
            PlannedSequence(
                example=number,
                response_set=name,
                terms={term_name: weight for term_name, weight in term._asdict().items() if weight},
                prompt_tokens=prompt,
                response_tokens=length - prompt,
                trained_tokens=int(trained_BL[row].sum()),
                padding=int((~mask_BL[row]).sum()) if run.packing == "none" else 0,
                pieces=pieces_of(ids_BL[row, :length], trained_BL[row, :length], prompt, special, tokenizer),
            )
        )
    return shown


def pieces_of(
    ids_L: NDArray[Any],
    trained_L: NDArray[np.bool_],
    prompt: int,
    special: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Piece]:
    """A sequence as pieces of text, each trained or not; of a long prompt or response only the two ends.

    Args:
        ids_L: integers [L], its token ids.
        trained_L: bool [L], whether each of them is trained.
        prompt: tokens of the prompt.
        special: ids of special tokens.
        tokenizer: the tokenizer.
    """
    length = len(ids_L)
    pieces: list[Piece] = []
    shown_to = 0
    for start, end in _shown_ranges(prompt, length):
        if start > shown_to:
            pieces.append(Piece("", bool(trained_L[shown_to]), left_out=start - shown_to))
        context = max(0, start - CONTEXT)
        decoded = texts_in_place(tokenizer, ids_L[context:end], np.empty((end - context, 0), dtype=np.int64))
        for place, whole in enumerate(decoded[start - context :], start):
            text, trained, is_special = whole.text, bool(trained_L[place]), int(ids_L[place]) in special
            last = pieces[-1] if pieces else None
            if last and not (is_special or last.special or last.left_out) and last.trained == trained:
                pieces[-1] = Piece(last.text + text, trained)
            else:
                pieces.append(Piece(text, trained, is_special))
        shown_to = end
    return pieces


def _shown_ranges(prompt: int, length: int) -> list[tuple[int, int]]:
    """The places of the tokens to show, as neighbouring or separate ranges."""
    ranges: list[tuple[int, int]] = []
    for start, end in ((0, prompt), (prompt, length)):
        cut = end - start > 2 * SHOWN_TOKENS + 1
        parts = [(start, start + SHOWN_TOKENS), (end - SHOWN_TOKENS, end)] if cut else [(start, end)]
        for part in parts:
            if ranges and ranges[-1][1] == part[0]:
                ranges[-1] = (ranges[-1][0], part[1])
            else:
                ranges.append(part)
    return ranges
