"""Scores with vLLM's V2 model runner on a CPU, both methods: ``python vllm_v2.py TEACHER REFERENCE SEQUENCES OUTPUT``.

Only that runner, which is written for GPUs, answers ``prompt_logprob_token_ids``. Much of it is Triton kernels, which
Triton's interpreter (``TRITON_INTERPRET=1``, set before anything imports Triton) runs on a CPU; but vLLM for CPUs
leaves Triton out unless Triton has a backend called "cpu", and Triton comes without one. Nothing of the backend is ever
called: the interpreter neither compiles nor looks for a device, so Triton's abstract classes will do.

This is a process of its own, because all that must happen before vLLM is imported, and vLLM changes its process.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend
from triton.backends.driver import DriverBase

backends["cpu"] = Backend(BaseBackend, DriverBase)

from adpa.data.cache.signal_rows import SignalRow  # noqa: E402
from adpa.data.cache.signals import Scoring  # noqa: E402
from adpa.data.sequences import TokenSequence, sequence_key  # noqa: E402
from adpa.pipeline.models.checkpoint import open_checkpoint  # noqa: E402
from adpa.pipeline.scoring.score import ReferenceLogprobs  # noqa: E402
from adpa.pipeline.scoring.vllm_engine import VllmEngine  # noqa: E402
from adpa.pipeline.scoring.vllm_options import VllmOptions  # noqa: E402

TOP_K = 20
CHUNK = 32  # tokens of a prefill step; longer prompts are split


def main(teacher: str, reference: str, sequences: str, output: str) -> None:
    """Writes one array for each sequence and column: the teacher's row, then the reference's log-probabilities."""
    tokens = np.load(sequences)
    count = len(tokens.files) // 2
    batch = [as_sequence(tokens[f"prompt{number}"], tokens[f"response{number}"]) for number in range(count)]
    batches = [batch[: count // 2], batch[count // 2 :]]
    models = [open_checkpoint(name) for name in (teacher, reference)]
    scoring = Scoring(models[0].identity, models[1].identity, "v", TOP_K, "float32", "vllm")
    options = VllmOptions(
        engine_arg=("enforce_eager=true", f"max_num_batched_tokens={CHUNK}", "kv_cache_memory_bytes=67108864")
    )
    longest = max(map(len, batch))

    def top_k(engine: VllmEngine) -> list[SignalRow]:
        scorer = engine.open_scorer(models[0], scoring, longest)
        rows = [row for answered in scorer.top_k(batches, TOP_K) for row in answered]
        scorer.close()
        return rows

    def logprobs_at(engine: VllmEngine, asked: list[NDArray[np.int32]]) -> list[ReferenceLogprobs]:
        scorer = engine.open_scorer(models[1], scoring, longest)
        parts = [asked[: count // 2], asked[count // 2 :]]
        given = [logprobs for answered in scorer.logprobs_at(batches, parts) for logprobs in answered]
        scorer.close()
        return given

    arrays: dict[str, np.ndarray] = {}
    ways: dict[str, Literal["float32"] | None] = {"hidden": None, "logprobs": "float32"}
    for way, head_dtype in ways.items():
        engine = VllmEngine(options, torch.device("cpu"), head_dtype, with_reference=True, reason="")
        rows = top_k(engine)
        asked = [row.topk_ids.copy() for row in rows]
        if head_dtype is not None:
            for number, ids in enumerate(asked):  # as in rows with fewer than K ids
                ids[:, TOP_K - 1 - number % 3 :] = -1
        for number, (row, ids, (own, at_ids)) in enumerate(zip(rows, asked, logprobs_at(engine, asked), strict=True)):
            arrays |= {
                f"{way}-own{number}": row.token_logprobs,
                f"{way}-ids{number}": row.topk_ids,
                f"{way}-logprobs{number}": row.topk_logprobs,
                f"{way}-tail{number}": row.tail_logprob,
                f"{way}-asked{number}": ids,
                f"{way}-reference_own{number}": own,
                f"{way}-reference{number}": at_ids,
            }
    np.savez(Path(output), allow_pickle=False, **arrays)


def as_sequence(prompt_ids: np.ndarray, response_ids: np.ndarray) -> TokenSequence:
    """A sequence of two int32 arrays."""
    return TokenSequence(sequence_key(prompt_ids, response_ids), prompt_ids, response_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
