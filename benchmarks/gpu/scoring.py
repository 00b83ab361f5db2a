"""Part d of the GPU benchmark: the time of scoring, divided into decoder, head and the rest.

Shapes: N response rows, C rows of a chunk, d hidden width, V vocabulary, T tokens of a response, K ids.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.gpu.measures import figure_of, in_turns, seconds
from benchmarks.gpu.models import (
    LARGE,
    MEDIUM,
    checkpoint,
    encoded_pairs,
    limits,
    preferences,
    random_model,
    sequences_of,
    shape_of,
)
from benchmarks.gpu.part import Figure, Measure, Setting
from benchmarks.gpu.vllm import obstacle, scoring_with_vllm, vllm_prefill

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.kernels.teacher_rows import teacher_rows
from adpa.pipeline.models.attention_mask import leave_out_padding_mask
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.models.lm_head import read_head
from adpa.pipeline.precompute import precompute
from adpa.pipeline.scoring.hf_scorer import HfDecoder, open_hf_scorer
from adpa.pipeline.scoring.jobs import make_batches
from adpa.pipeline.scoring.scorer_head import HeadScorer

TOP_K = 50
BATCH_TOKENS = 32_768
ROWS = 1024  # rows of logits; their time is scaled to all rows
ROUNDS = 3


def scoring(setting: Setting) -> list[Measure]:
    """The measures of part d."""
    return [
        Measure(f"{MEDIUM}: decoder and head", 20, partial(decoder_and_head, setting, MEDIUM)),
        Measure(f"{MEDIUM}: precompute", 15, partial(whole_precompute, setting, MEDIUM)),
        Measure("signals", 25, partial(compare_signals, setting)),
        Measure(f"{LARGE}: decoder and head", 30, partial(decoder_and_head, setting, LARGE)),
        Measure(f"{MEDIUM}: vLLM, bare prefill", 40, partial(vllm_prefill, setting), obstacle(setting)),
        *(
            Measure(
                f"{MEDIUM}: vLLM, async scheduling {is_async}",
                40,
                partial(scoring_with_vllm, setting, is_async),
                obstacle(setting),
            )
            for is_async in (True, False)
        ),
        Measure(f"{LARGE}: precompute", 60, partial(whole_precompute, setting, LARGE)),
    ]


def pairs_of(setting: Setting, size: str) -> int:
    """Number of scored pairs."""
    return 4 if setting.dry else {MEDIUM: 160, LARGE: 64}[size]


def decoder_and_head(setting: Setting, size: str) -> Iterator[Figure]:
    """Scoring with a model in memory: the decoder alone, decoder and head, and the pass over the logits alone."""
    sequences = sequences_of(encoded_pairs(setting, pairs_of(setting, size)))
    batches = make_batches(sequences, len, BATCH_TOKENS)
    tokens = sum(map(len, sequences))
    rows = sum(len(sequence.response_ids) for sequence in sequences)
    model = random_model(setting, size)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as for a loaded checkpoint
    leave_out_padding_mask(model)
    decoder, head = HfDecoder(model), read_head(model)
    scorer = HeadScorer(size, decoder, head)
    logits_CV = torch.randn(ROWS, len(head.weight), device=setting.device)
    labels_C = torch.randint(len(head.weight), (ROWS,))
    hidden_Cd = torch.randn(ROWS, head.weight.shape[1], device=setting.device, dtype=head.weight.dtype)
    wide_Vd = head.weight.detach().float()
    ways = {
        "decoder": lambda: exhaust(decoder.response_hidden(batches)),
        "scorer": lambda: exhaust(scorer.top_k(batches, TOP_K)),
        "rows": lambda: teacher_rows(logits_CV, labels_C, TOP_K),
        "product": lambda: head.float32_logits(hidden_Cd),
        "float32 product": lambda: hidden_Cd.float() @ wide_Vd.T,
    }
    taken = in_turns(ways, 1 if setting.dry else ROUNDS, setting.device)
    yield figure_of(f"{size}: decoder", [tokens / one for one in taken["decoder"]], "tokens/s")
    yield figure_of(f"{size}: decoder and head", [tokens / one for one in taken["scorer"]], "tokens/s")
    shape = shape_of(setting, size)
    flops = float(shape.decoder_flops(np.array([len(sequence) for sequence in sequences])).sum())
    yield figure_of(f"{size}: decoder, FLOP/s", [flops / one / 1e12 for one in taken["decoder"]], "TFLOP/s")
    whole, bare, chunk, wide = (
        statistics.median(taken[name]) for name in ("scorer", "decoder", "rows", "float32 product")
    )
    all_rows, wide = chunk * rows / ROWS, wide * rows / ROWS
    yield Figure(f"{size}: head / scoring", 1 - bare / whole)
    if whole > bare:  # noise may exceed the time of a small head
        yield Figure(f"{size}: head, FLOP/s", shape.head_flops(rows) / (whole - bare) / 1e12, "TFLOP/s")
    yield Figure(f"{size}: teacher rows / scoring", all_rows / whole)
    yield Figure(f"{size}: head product in float32 / scoring", wide / (bare + wide + all_rows))
    product = statistics.median(taken["product"])
    yield Figure(f"{size}: teacher rows / head product", chunk / product)
    chunk_flops = [shape.head_flops(ROWS) / one / 1e12 for one in taken["product"]]
    yield figure_of(f"{size}: head product, FLOP/s", chunk_flops, "TFLOP/s", "bfloat16 factors, float32 sums")


def whole_precompute(setting: Setting, size: str) -> Iterator[Figure]:
    """``adpa.precompute`` with a teacher, and its time by kind of work."""
    path = checkpoint(setting, size)
    data = str(preferences(setting, pairs_of(setting, size)))
    sequences = sequences_of(encoded_pairs(setting, pairs_of(setting, size)))
    batches = make_batches(sequences, len, BATCH_TOKENS)
    options: dict[str, Any] = {"teacher": str(path), "data": data, **limits(setting)}
    options |= {"engine": "hf", "batch_tokens": BATCH_TOKENS}
    opened = open_checkpoint(str(path))

    started = time.perf_counter()
    scorer = open_hf_scorer(opened, opened.dtype_name("auto"), torch.device(setting.device))
    loading = time.perf_counter() - started
    yield Figure(f"{size}: loading", opened.weight_bytes(opened.dtype_name("auto")) / loading / 1e9, "GB/s")
    exhaust(scorer.top_k(batches[:1], TOP_K))
    asking = seconds(lambda: exhaust(scorer.top_k(batches, TOP_K)), setting.device)
    scorer.close()

    cache = setting.folder / f"{size}-cache"
    for _ in range(2):  # the first time it reads every byte of the checkpoint
        reading = precompute(cache=cache, dry_run=True, **options).seconds
    done = precompute(cache=cache, top_k=TOP_K, **options)
    yield Figure(f"{size}: precompute", sum(map(len, sequences)) / done.seconds, "tokens/s")
    yield Figure(f"{size}: bytes of a response token", done.bytes / done.tokens, "B")
    parts = {"reading the data": reading, "loading": loading, "asking the model": asking}
    parts["writing and the rest"] = done.seconds - sum(parts.values())
    for name, part in parts.items():
        yield Figure(f"{size}: {name} / precompute", part / done.seconds)


def compare_signals(setting: Setting) -> Iterator[Figure]:
    """The signals of a few short sequences, computed on the device, against a float32 forward pass on the CPU."""
    sequences = [
        TokenSequence(sequence_key(prompt, response), prompt, response)
        for pair in encoded_pairs(setting, 4)
        for prompt, response in [(pair.prompt_ids[-64:], pair.chosen_ids[:64])]
    ]
    opened = open_checkpoint(str(checkpoint(setting, MEDIUM)))

    def signals(dtype: str, device: str) -> list[SignalRow]:
        scorer = open_hf_scorer(opened, dtype, torch.device(device))
        (rows,) = scorer.top_k([sequences], TOP_K)
        scorer.close()
        return rows

    exact = signals("float32", "cpu")
    for dtype in ("float32", "bfloat16"):
        yield from differences(f"{dtype} against float32 on a CPU", signals(dtype, setting.device), exact)


def differences(name: str, measured: Sequence[SignalRow], exact: Sequence[SignalRow]) -> Iterator[Figure]:
    """The differences of signals from exact ones."""
    shared, own, tail = zip(*(difference(*rows) for rows in zip(measured, exact, strict=True)), strict=True)
    yield Figure(f"{name}: ids in common", statistics.mean(shared))
    yield Figure(f"{name}: largest |Δ log p| of own tokens", max(own), "nats")
    yield Figure(f"{name}: largest |Δ log p| of the tail", max(tail), "nats")


def difference(measured: SignalRow, exact: SignalRow) -> tuple[float, float, float]:
    """For one sequence: the share of ids in common, and the largest differences at its tokens and in the tail."""
    ids = zip(measured.topk_ids, exact.topk_ids, strict=True)
    shared = statistics.mean(len(np.intersect1d(one_K, other_K)) / len(other_K) for one_K, other_K in ids)
    own_T = np.abs(measured.token_logprobs - exact.token_logprobs)
    tail_T = np.abs(measured.tail_logprob - exact.tail_logprob)
    return shared, float(own_T.max()), float(tail_T.max())


def exhaust(answers: Iterable[object]) -> None:
    """Takes all answers and drops them."""
    for _ in answers:
        pass
