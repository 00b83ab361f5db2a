"""Measures the speed of packing: DCKD steps of SmolLM2-135M on padded and packed batches. Part of ``make bench``.

    python -m benchmarks.packing --data preferences.jsonl

The teacher is SmolLM2 itself, because a step takes the same time with any teacher; it scores the pairs once. All
layouts compute the same micro-batches, in turns, so that a ratio compares times of the same moment. Ratios use CPU
seconds, which other work disturbs less. Tokens are counted without padding, and a prompt counts with each of its
responses, so that the number is the same for every layout.

The expected speed counts matrix products alone: the decoder's parameters for each computed token, and the head's for
each response token. A second table shows it for all pairs and for longer limits, whose steps would take long on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from benchmarks.encoding import text_pairs
from benchmarks.scoring import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adpa.data.batches import (
    TrainingExamples,
    TrainingSequence,
    collate,
    count_tokens,
    pad_sequences,
)
from adpa.data.cache.responses import ResponseName
from adpa.data.cache.selection import Need, select
from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.packing import pack_sequences
from adpa.data.rows import read_rows
from adpa.data.sequences import Packing, TokenSequence
from adpa.data.vocabulary import load_tokenizer
from adpa.lab.smollm2 import save_smollm2
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.precompute import precompute
from adpa.pipeline.training.student import attach_distill_head

PACKINGS: tuple[Packing, ...] = get_args(Packing)
NAMES = {"none": "padded", "sequences": "--packing sequences", "prompts": "--packing prompts"}
MICRO_BATCH = 4  # the default of adpa distill
LIMITS = ((256, 512), (512, 1024), (1024, 2048))  # tokens of prompt and sequence; the last are precompute's defaults


@dataclass
class Layout:
    """A layout of micro-batches, and its measurements.

    Attributes:
        packing: its name.
        attention: name of the student's attention for this layout.
        seconds: for each step, wall-clock and CPU seconds.
        computed: tokens that the decoder computes in all micro-batches.
        first_loss: loss of the first micro-batch.
        gradient: gradient of the first micro-batch, all parameters concatenated.
        saved_bytes: bytes that the first micro-batch keeps for the backward pass, without parameters.
    """

    packing: Packing
    attention: str
    seconds: list[tuple[float, float]] = field(default_factory=list)
    computed: int = 0
    first_loss: float = 0.0
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    saved_bytes: int = 0


def main() -> None:
    """Scores the pairs, runs the steps, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.packing")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    parser.add_argument("--pairs", type=int, default=12, help=f"number of pairs; {MICRO_BATCH} are a micro-batch")
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds over all micro-batches")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="maximum tokens of a prompt")
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens of a sequence")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        smollm2, preferences, cache = (Path(folder) / name for name in ("smollm2", "preferences.jsonl", "cache"))
        save_smollm2(smollm2)
        lines = (
            arguments.data.read_text().splitlines()
            if arguments.data
            else list(map(json.dumps, text_pairs(arguments.pairs)))
        )
        preferences.write_text("\n".join(lines[: arguments.pairs]))
        (whole := Path(folder) / "whole.jsonl").write_text("\n".join(lines))
        precompute(
            teacher=str(smollm2),
            data=str(preferences),
            cache=cache,
            engine="hf",
            max_prompt_length=arguments.max_prompt_length,
            max_length=arguments.max_length,
        )
        needs: dict[ResponseName, Need] = {"chosen": Need(True, False), "rejected": Need(True, False)}
        examples = TrainingExamples(select(cache, needs, student="").training_sets(needs))
        tokenizer = load_tokenizer(smollm2)
        whole_pairs = [
            list(Encoder(ChatTemplate(tokenizer), *limits).encode(read_rows(str(whole)))) for limits in LIMITS
        ]
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).train()
    attach_distill_head(model)
    padded = model.config._attn_implementation
    allow_packing(model)
    packed = model.config._attn_implementation
    assert padded is not None
    assert packed is not None
    layouts = [Layout(packing, padded if packing == "none" else packed) for packing in PACKINGS]
    read = [examples[number] for number in range(len(examples))]
    micro_batches = [read[start : start + MICRO_BATCH] for start in range(0, len(read), MICRO_BATCH)]
    for layout in layouts:
        first_step(model, layout, micro_batches)
    for number, micro_batch in enumerate(micro_batches * arguments.rounds):
        for place in range(len(layouts)):
            layout = layouts[(number + place) % len(layouts)]  # the order rotates
            layout.seconds.append(step(model, layout, micro_batch))
    print_table(model, layouts, micro_batches, arguments.rounds)
    print_expected(model, whole_pairs)


def step(
    model: PreTrainedModel, layout: Layout, micro_batch: Sequence[Sequence[TrainingSequence]]
) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a forward and backward pass of DCKD. The gradient stays in the model."""
    model.zero_grad()
    model.set_attn_implementation(layout.attention)
    started, cpu_started = time.perf_counter(), time.process_time()
    batch = collate(micro_batch, layout.packing)
    rejected_N = batch.pop("set_number") == 1
    weight_N = torch.full(rejected_N.shape, 1 / len(rejected_N))
    nll_N = weight_N.masked_fill(rejected_N, 0)
    loss, _ = model(**batch, nll_weight=nll_N, kl_weight=weight_N, advantage_weight=torch.zeros_like(weight_N))
    loss.backward()
    if not layout.first_loss:
        layout.first_loss = loss.item()
    return time.perf_counter() - started, time.process_time() - cpu_started


def first_step(
    model: PreTrainedModel, layout: Layout, micro_batches: Sequence[Sequence[Sequence[TrainingSequence]]]
) -> None:
    """Counts tokens and bytes, and runs a first step, which warms up."""
    layout.computed = sum(collate(micro_batch, layout.packing)["input_ids"].numel() for micro_batch in micro_batches)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step(model, layout, micro_batches[0])
    layout.saved_bytes = sum(saved.values())
    gradients = [parameter.grad for parameter in model.parameters()]
    layout.gradient = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def print_table(
    model: PreTrainedModel,
    layouts: Sequence[Layout],
    micro_batches: Sequence[Sequence[Sequence[TrainingSequence]]],
    rounds: int,
) -> None:
    """Prints the speed and memory of each layout, with its expected speed."""
    batches = [collate(micro_batch) for micro_batch in micro_batches]
    tokens = [int(count_tokens(batch)) for batch in batches]
    response_tokens = sum(len(batch["labels"]) for batch in batches)
    prompt_share = 1 - response_tokens / sum(tokens)
    padding = 1 - sum(tokens) / layouts[0].computed
    print(
        f"{len(micro_batches)} micro-batches of {MICRO_BATCH} pairs, {sum(tokens):,} tokens: {prompt_share:.0%} in "
        f"prompts; of the padded tokens {padding:.0%} are padding; float32, {torch.get_num_threads()} threads; "
        f"speed by CPU seconds: median (least to most) of {len(layouts[0].seconds)} steps, against the same micro-batch"
    )
    costs = [products(model, layout.computed, response_tokens) for layout in layouts]
    table = Table(
        "", "tokens computed", "tokens/s", "speed, padded = 1", "expected", "kept for backward", "loss", "gradient"
    )
    for layout, cost in zip(layouts, costs, strict=True):
        ratios = [padded / cpu for (_, padded), (_, cpu) in zip(layouts[0].seconds, layout.seconds, strict=True)]
        table.add_row(
            NAMES[layout.packing],
            f"{layout.computed:,}",
            f"{rounds * sum(tokens) / sum(seconds for seconds, _ in layout.seconds):,.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{costs[0] / cost:.2f}",
            f"{layout.saved_bytes / 2**20:,.0f} MiB",
            f"{abs(layout.first_loss / layouts[0].first_loss - 1):.0e}",
            f"{float((layout.gradient - layouts[0].gradient).norm() / layouts[0].gradient.norm()):.0e}",
        )
    Console(width=140).print(table)
    print("loss, gradient: relative differences from the padded layout in the first micro-batch")


def products(model: PreTrainedModel, computed: int, response_tokens: int) -> int:
    """Multiplications by weights in a forward pass. A backward pass has twice as many."""
    head: int = model.get_output_embeddings().weight.numel()
    decoder = sum(parameter.numel() for parameter in model.parameters()) - head  # the embedding is the head
    return decoder * computed + head * response_tokens


def print_expected(model: PreTrainedModel, pairs_by_limits: Sequence[Sequence[EncodedPair]]) -> None:
    """Prints the expected speed for the lengths of all pairs, in micro-batches of random order."""
    table = Table(
        "limits", "pairs", "tokens a pair", "in prompts", "padding", *(NAMES[packing] for packing in PACKINGS[1:])
    )
    for (max_prompt, max_whole), pairs in zip(LIMITS, pairs_by_limits, strict=True):
        computed = dict.fromkeys(PACKINGS, 0)
        order = np.random.default_rng(0).permutation(len(pairs))
        for start in range(0, len(pairs), MICRO_BATCH):
            chosen = [pairs[number] for number in order[start : start + MICRO_BATCH]]
            sequences = [
                TokenSequence(b"", pair.prompt_ids, response_ids)
                for pair in chosen
                for response_ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            computed["none"] += pad_sequences(sequences).input_ids.numel()
            for packing in PACKINGS[1:]:
                computed[packing] += pack_sequences(sequences, share_prompts=packing == "prompts").input_ids.numel()
        response_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        costs = {packing: products(model, tokens, response_tokens) for packing, tokens in computed.items()}
        table.add_row(
            f"{max_prompt:,}, {max_whole:,}",
            f"{len(pairs)}",
            f"{computed['sequences'] / len(pairs):,.0f}",
            f"{1 - response_tokens / computed['sequences']:.0%}",
            f"{1 - computed['sequences'] / computed['none']:.0%}",
            *(f"{costs['none'] / costs[packing]:.2f}" for packing in PACKINGS[1:]),
        )
    print("expected speed, padded = 1, of all pairs in random order, for each limit of prompt and sequence")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
