"""Measures the time to read batches from the cache, as a share of a training step: part of ``make bench``.

    python -m benchmarks.reading

The student has the size of SmolLM2-135M, with six layers. The signals are random numbers of the real shape, because
their values do not change the time. Reads and steps alternate in one run, and only their ratio counts.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adpa.data.batches import TrainingExamples, collate
from adpa.data.cache.responses import ResponseName, ResponseSet, ResponseSetInfo, make_response_set
from adpa.data.cache.selection import TrainingSet
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring, read_signals, write_signals
from adpa.data.sequences import TokenIds
from adpa.pipeline.training.student import attach_distill_head

VOCABULARY, TOP_K = 49152, 50
EXAMPLES, BATCH, ROUNDS = 64, 4, 8
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 192
SCORING = Scoring(ModelIdentity("random", None, "0"), None, "0", TOP_K, "float32", "none")


def main() -> None:
    """Prints the median ratio and its spread."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        sets = [write_set(cache, name, generator) for name in ("chosen", "rejected")]
        signals = read_signals(cache, SCORING)
        examples = TrainingExamples([TrainingSet(one, signals) for one in sets])
        ratios = measure(examples, generator)
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(
        f"reading a batch of {BATCH} examples ({2 * BATCH * RESPONSE_TOKENS} response tokens, K = {TOP_K}): "
        f"{median:.2%} of a training step on {torch.get_num_threads()} threads "
        f"({low:.2%} to {high:.2%} in {ROUNDS} rounds)"
    )


def write_set(cache: Path, name: ResponseName, generator: np.random.Generator) -> ResponseSet:
    """A response set of random tokens, its signals written in eight shards."""

    def tokens(count: int) -> TokenIds:
        return generator.integers(0, VOCABULARY, count).astype(np.int32)

    info = ResponseSetInfo(name, "0", "0", "0", 2, PROMPT_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS, 0, 0)
    rows = [(f"{example:04}", tokens(PROMPT_TOKENS), tokens(RESPONSE_TOKENS)) for example in range(EXAMPLES)]
    responses = make_response_set(info, rows)
    signals = [random_signals(sequence.key, generator) for sequence in responses.sequences()]
    for start in range(0, EXAMPLES, 8):
        write_signals(cache, SCORING, signals[start : start + 8])
    return responses


def random_signals(key: bytes, generator: np.random.Generator) -> SignalRow:
    """Signals of a response, with falling log-probabilities like a teacher's."""
    ids = generator.permutation(VOCABULARY)[:TOP_K].astype(np.int32)
    logprobs = -0.3 * np.arange(TOP_K) - 1.4
    per_token = np.full(RESPONSE_TOKENS, -1.0, dtype=np.float32)
    return SignalRow(
        key, per_token, np.tile(ids, (RESPONSE_TOKENS, 1)), np.tile(logprobs, (RESPONSE_TOKENS, 1)), per_token - 10
    )


def measure(examples: TrainingExamples, generator: np.random.Generator) -> list[float]:
    """Reading time over step time, round by round; the first round is warm-up."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    attach_distill_head(model)
    ratios = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        batch = collate([examples[int(index)] for index in generator.integers(0, len(examples), BATCH)])
        read = time.perf_counter()
        weight = torch.full(batch.pop("set_number").shape, 1e-3)
        loss, _ = model(**batch, nll_weight=weight, kl_weight=weight, advantage_weight=weight)
        loss.backward()
        model.zero_grad()
        ratios.append((read - start) / (time.perf_counter() - read))
    return ratios[1:]


if __name__ == "__main__":
    main()
