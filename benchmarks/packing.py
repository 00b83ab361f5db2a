"""What packing brings: DCKD steps of SmolLM2-135M on padded, packed and shared-prompt batches: ``make bench``.

The teacher is SmolLM2 itself (what it says costs a step nothing); its signals are made once. Every way computes the
same micro-batches, in turns, so that ratios are of the same moment, and of CPU seconds, which other work disturbs less.
Tokens are those of the sequences as they are, without padding, a prompt counted with each of its responses: the same
number for every way.

What is expected comes from matrix products alone: the decoder's parameters for each token that is computed, the head's
for each response token. A second table has it for all pairs and longer limits, whose steps would take long on a CPU.
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
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.packing import pack_sequences
from adpa.data.preferences import read_rows
from adpa.data.sequences import Packing, TokenSequence
from adpa.data.vocabulary import find_turn_end, load_tokenizer
from adpa.lab.smollm2 import save_smollm2
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.precompute import precompute
from adpa.pipeline.training.student import attach_distill_head

WAYS: tuple[Packing, ...] = get_args(Packing)
NAMES = {"none": "padded", "sequences": "--packing sequences", "prompts": "--packing prompts"}
MICRO_BATCH = 4  # as adpa distill takes them
LIMITS = ((256, 512), (512, 1024), (1024, 2048))  # of a prompt and of a sequence; the last are precompute's


@dataclass
class Way:
    """A way of laying out a micro-batch, and what was measured of it.

    Attributes:
        packing: its name.
        attention: the name of the student's attention that takes it.
        seconds: of each step, on the clock and on the CPU.
        computed: tokens that the decoder computes for all micro-batches.
        first_loss: of the first micro-batch.
        gradient: of the first micro-batch, all parameters on end.
        saved_bytes: what the first micro-batch keeps for the backward pass, parameters left out.
    """

    packing: Packing
    attention: str
    seconds: list[tuple[float, float]] = field(default_factory=list)
    computed: int = 0
    first_loss: float = 0.0
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    saved_bytes: int = 0


def main() -> None:
    """Scores the pairs, steps through them, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.packing")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    parser.add_argument("--pairs", type=int, default=12, help=f"how many; {MICRO_BATCH} are a micro-batch")
    parser.add_argument("--rounds", type=int, default=1, help="how often every way computes every micro-batch")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens of a prompt that are kept")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sequence that are kept")
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
        examples = TrainingExamples(select(cache, needs, student="").parts(needs))
        tokenizer = load_tokenizer(smollm2)
        whole_pairs = [
            list(Encoder(tokenizer, find_turn_end(tokenizer), *limits).encode(read_rows(str(whole))))
            for limits in LIMITS
        ]
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).train()
    attach_distill_head(model)
    padded = model.config._attn_implementation
    allow_packing(model)
    packed = model.config._attn_implementation
    assert padded is not None
    assert packed is not None
    ways = [Way(packing, padded if packing == "none" else packed) for packing in WAYS]
    read = [examples[number] for number in range(len(examples))]
    micro_batches = [read[start : start + MICRO_BATCH] for start in range(0, len(read), MICRO_BATCH)]
    for way in ways:
        try_out(model, way, micro_batches)
    for number, micro_batch in enumerate(micro_batches * arguments.rounds):
        for place in range(len(ways)):
            way = ways[(number + place) % len(ways)]  # each has each turn
            way.seconds.append(step(model, way, micro_batch))
    print_table(model, ways, micro_batches, arguments.rounds)
    print_expected(model, whole_pairs)


def step(model: PreTrainedModel, way: Way, micro_batch: Sequence[Sequence[TrainingSequence]]) -> tuple[float, float]:
    """Seconds of forward and backward pass of DCKD, on the clock and on the CPU; the gradient stays."""
    model.zero_grad()
    model.set_attn_implementation(way.attention)
    started, cpu_started = time.perf_counter(), time.process_time()
    batch = collate(micro_batch, way.packing)
    rejected_N = batch.pop("part") == 1
    weight_N = torch.full(rejected_N.shape, 1 / len(rejected_N))
    nll_N = weight_N.masked_fill(rejected_N, 0)
    loss, _ = model(**batch, nll_weight=nll_N, kl_weight=weight_N, advantage_weight=torch.zeros_like(weight_N))
    loss.backward()
    if not way.first_loss:
        way.first_loss = loss.item()
    return time.perf_counter() - started, time.process_time() - cpu_started


def try_out(model: PreTrainedModel, way: Way, micro_batches: Sequence[Sequence[Sequence[TrainingSequence]]]) -> None:
    """Counts, and takes a first step, which warms up."""
    way.computed = sum(collate(micro_batch, way.packing)["input_ids"].numel() for micro_batch in micro_batches)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step(model, way, micro_batches[0])
    way.saved_bytes = sum(saved.values())
    gradients = [parameter.grad for parameter in model.parameters()]
    way.gradient = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def print_table(
    model: PreTrainedModel,
    ways: Sequence[Way],
    micro_batches: Sequence[Sequence[Sequence[TrainingSequence]]],
    rounds: int,
) -> None:
    """Prints what each way costs, beside what the tokens it computes let expect."""
    batches = [collate(micro_batch) for micro_batch in micro_batches]
    tokens = [int(count_tokens(batch)) for batch in batches]
    response_tokens = sum(len(batch["labels"]) for batch in batches)
    prompt_share = 1 - response_tokens / sum(tokens)
    padding = 1 - sum(tokens) / ways[0].computed
    print(
        f"{len(micro_batches)} micro-batches of {MICRO_BATCH} pairs, {sum(tokens):,} tokens: {prompt_share:.0%} in "
        f"prompts; of the padded tokens {padding:.0%} are padding; float32, {torch.get_num_threads()} threads; "
        f"speed by CPU seconds: median (least to most) of {len(ways[0].seconds)} steps, against the same micro-batch"
    )
    costs = [products(model, way.computed, response_tokens) for way in ways]
    table = Table(
        "", "tokens computed", "tokens/s", "speed, padded = 1", "expected", "kept for backward", "loss", "gradient"
    )
    for way, cost in zip(ways, costs, strict=True):
        ratios = [padded / cpu for (_, padded), (_, cpu) in zip(ways[0].seconds, way.seconds, strict=True)]
        table.add_row(
            NAMES[way.packing],
            f"{way.computed:,}",
            f"{rounds * sum(tokens) / sum(seconds for seconds, _ in way.seconds):,.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{costs[0] / cost:.2f}",
            f"{way.saved_bytes / 2**20:,.0f} MiB",
            f"{abs(way.first_loss / ways[0].first_loss - 1):.0e}",
            f"{float((way.gradient - ways[0].gradient).norm() / ways[0].gradient.norm()):.0e}",
        )
    Console(width=140).print(table)
    print("loss, gradient: relative differences from the padded way in the first micro-batch")


def products(model: PreTrainedModel, computed: int, response_tokens: int) -> int:
    """Multiplications by the weights of a forward pass; a backward pass has twice as many."""
    head: int = model.get_output_embeddings().weight.numel()
    decoder = sum(parameter.numel() for parameter in model.parameters()) - head  # the embedding is the head
    return decoder * computed + head * response_tokens


def print_expected(model: PreTrainedModel, pairs_by_limits: Sequence[Sequence[EncodedPair]]) -> None:
    """Prints what the lengths of all pairs let expect, in micro-batches of random order."""
    table = Table("limits", "pairs", "tokens a pair", "in prompts", "padding", *(NAMES[way] for way in WAYS[1:]))
    for (max_prompt, max_whole), pairs in zip(LIMITS, pairs_by_limits, strict=True):
        computed = dict.fromkeys(WAYS, 0)
        order = np.random.default_rng(0).permutation(len(pairs))
        for start in range(0, len(pairs), MICRO_BATCH):
            chosen = [pairs[number] for number in order[start : start + MICRO_BATCH]]
            sequences = [
                TokenSequence(b"", pair.prompt_ids, response_ids)
                for pair in chosen
                for response_ids in (pair.chosen_ids, pair.rejected_ids)
            ]
            computed["none"] += pad_sequences(sequences).input_ids.numel()
            for way in WAYS[1:]:
                computed[way] += pack_sequences(sequences, share_prompts=way == "prompts").input_ids.numel()
        response_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        costs = {way: products(model, tokens, response_tokens) for way, tokens in computed.items()}
        table.add_row(
            f"{max_prompt:,}, {max_whole:,}",
            f"{len(pairs)}",
            f"{computed['sequences'] / len(pairs):,.0f}",
            f"{1 - response_tokens / computed['sequences']:.0%}",
            f"{1 - computed['sequences'] / computed['none']:.0%}",
            *(f"{costs['none'] / costs[way]:.2f}" for way in WAYS[1:]),
        )
    print("expected speed, padded = 1, of all pairs in random order by the limits of prompt and sequence")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
