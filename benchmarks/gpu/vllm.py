"""Measures of vLLM for the GPU benchmark, if vLLM is installed: bare prefill, scoring, sampling."""

from collections.abc import Iterator

import numpy as np
import torch
from benchmarks.gpu.measures import figure_of, in_turns
from benchmarks.gpu.models import MEDIUM, SMALL, checkpoint, encoded_pairs, sequences_of, text_tokenizer
from benchmarks.gpu.part import Figure, Setting

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.signals import Scoring
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.scoring.jobs import make_batches
from adpa.pipeline.scoring.vllm_engine import BATCH_TOKENS, VllmEngine, obstacle_to_vllm, open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions

PAIRS, PROMPTS, NEW_TOKENS = 160, 256, 128
ROUNDS = 2
EAGER = "enforce_eager=true"  # an engine starts sooner without compilation, which speeds prefill up only a little
CPU_KV_CACHE = 64 << 20


def obstacle(setting: Setting) -> str | None:
    """The reason why vLLM is not measured here, if any."""
    if setting.dry:
        return "a dry run starts no engine"
    return obstacle_to_vllm(torch.device(setting.device))


def open_engine(setting: Setting, opened: Checkpoint, *arguments: str) -> VllmEngine:
    """Opens adpa's engine on vLLM."""
    if setting.dry:
        arguments = (*arguments, EAGER, f"kv_cache_memory_bytes={CPU_KV_CACHE}")
    options, dtype = VllmOptions(engine_arg=arguments), opened.dtype_name("auto")
    return open_vllm(options, torch.device(setting.device), {"teacher": opened}, {"teacher": dtype}, "benchmark")


def vllm_prefill(setting: Setting) -> Iterator[Figure]:
    """vLLM itself reads the sequences and generates one token after each."""
    from vllm import LLM, SamplingParams

    opened = open_checkpoint(str(checkpoint(setting, MEDIUM)))
    sequences = sequences_of(encoded_pairs(setting, 4 if setting.dry else PAIRS))
    prompts = [
        {"prompt_token_ids": np.concatenate([sequence.prompt_ids, sequence.response_ids]).tolist()}
        for sequence in sequences
    ]
    model = LLM(
        str(opened.directory),
        skip_tokenizer_init=True,
        dtype=opened.dtype_name("auto"),
        enable_prefix_caching=False,
        enforce_eager=True,
        max_model_len=max(map(len, sequences)) + 1,
        **({"kv_cache_memory_bytes": CPU_KV_CACHE} if setting.dry else {}),
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    taken = in_turns({"": lambda: model.generate(prompts, params, use_tqdm=False)}, ROUNDS, setting.device)[""]
    model.llm_engine.engine_core.shutdown()
    yield figure_of(f"{MEDIUM}: vLLM, bare prefill", [sum(map(len, sequences)) / one for one in taken], "tokens/s")


def scoring_with_vllm(setting: Setting, is_async: bool) -> Iterator[Figure]:
    """The teacher's pass on hidden states from vLLM, with or without asynchronous scheduling."""
    opened = open_checkpoint(str(checkpoint(setting, MEDIUM)))
    sequences = sequences_of(encoded_pairs(setting, 4 if setting.dry else PAIRS))
    engine = open_engine(setting, opened, EAGER, f"async_scheduling={str(is_async).lower()}")
    scoring = Scoring(opened.identity, None, "", 50, opened.dtype_name("auto"), engine.name)
    scorer = engine.open_scorer(opened, scoring, max(map(len, sequences)))
    batches = make_batches(sequences, len, BATCH_TOKENS)
    taken = in_turns({"": lambda: list(scorer.top_k(batches, 50))}, ROUNDS, setting.device)[""]
    scorer.close()
    name = f"{MEDIUM}: vLLM, decoder and head, async scheduling {'on' if is_async else 'off'}"
    yield figure_of(name, [sum(map(len, sequences)) / one for one in taken], "tokens/s")


def sampling_with_vllm(setting: Setting) -> Iterator[Figure]:
    """The speed of a student's sampling."""
    opened = open_checkpoint(str(checkpoint(setting, SMALL)))
    new_tokens = 4 if setting.dry else NEW_TOKENS
    requests = [SampleRequest(pair.prompt_ids, 0) for pair in encoded_pairs(setting, 4 if setting.dry else PROMPTS)]
    engine = open_engine(setting, opened)
    sampling = Sampling(
        student=opened.identity.digest,
        turn_end=int(text_tokenizer().eos_token_id),
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        samples_per_prompt=1,
        seed=0,
        dtype=opened.dtype_name("auto"),
        engine=engine.sampling_name,
    )
    longest = max(len(request.prompt_ids) for request in requests) + new_tokens
    sampler = engine.open_sampler(opened, sampling, longest)
    lengths: list[int] = []

    def sample() -> None:
        lengths[:] = [len(response) for batch in sampler.sample([requests]) for response in batch]

    taken = in_turns({"": sample}, ROUNDS, setting.device)[""]
    sampler.close()
    yield figure_of("vLLM", [sum(lengths) / one for one in taken], "tokens/s")
