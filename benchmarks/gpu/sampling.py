"""Part f of the GPU benchmark: the speed of sampling."""

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.models import SMALL, TEACHER, checkpoint, limits, preferences
from benchmarks.gpu.part import Figure, Measure, Setting
from benchmarks.gpu.vllm import obstacle, sampling_with_vllm

from adpa.pipeline.precompute import precompute

PROMPTS, TOKENS = 96, (16, 112)
DRY_PROMPTS, DRY_TOKENS = 2, (2, 6)


def sampling(setting: Setting) -> list[Measure]:
    """The measures of part f."""
    return [
        Measure("transformers", 25, partial(with_transformers, setting)),
        Measure("vLLM", 80, partial(sampling_with_vllm, setting), obstacle(setting)),
    ]


def with_transformers(setting: Setting) -> Iterator[Figure]:
    """Runs ``adpa.precompute`` with short and with long responses. The difference excludes all one-time work.

    A student with random weights never ends its turn, so that every response has the maximum length. The time includes
    scoring the responses with a small teacher.
    """
    prompts, lengths = (DRY_PROMPTS, DRY_TOKENS) if setting.dry else (PROMPTS, TOKENS)
    short, long = lengths
    seconds = {}
    for new_tokens in (short, short, long):  # the first run warms up
        folder = setting.folder / f"sampling-{len(list(setting.folder.glob('sampling-*')))}"
        report = precompute(
            teacher=str(checkpoint(setting, TEACHER)),
            student=str(checkpoint(setting, SMALL)),
            data=str(preferences(setting, prompts)),
            cache=folder,
            engine="hf",
            max_new_tokens=new_tokens,
            **limits(setting),
        )
        seconds[new_tokens] = report.seconds
    tokens = prompts * (long - short)
    yield Figure(
        "transformers, batches by default",
        tokens / max(seconds[long] - seconds[short], 1e-9),
        "tokens/s",
        note=f"{prompts} prompts, tokens {short + 1} to {long} of each response",
    )
