"""Sampling with transformers.

Every response has its own stream of uniform numbers, derived from the seed, the prompt and its index, and is drawn
by inverting the cumulative distribution: what is sampled does not depend on the batch it is sampled in, as far as the
student's logits do not. In float32 they differ by rounding and responses are the same; in bfloat16 some are not.

Shapes: B sequences of a batch, V vocabulary rows.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from adpa.data.responses import Sampling
from adpa.data.samples import SampleRequest
from adpa.data.sequences import TokenIds
from adpa.errors import ModelError
from adpa.pipeline.checkpoint import Checkpoint
from adpa.pipeline.sampling import stream_seed


class HfSampler:
    """A ``Sampler`` on a transformers model."""

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, device: torch.device) -> None:
        self._model = checkpoint.load(sampling.dtype, device).eval()
        self._sampling = sampling

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """See ``Sampler.sample``."""
        return (sample(self._model, self._sampling, batch) for batch in batches)

    def close(self) -> None:
        """See ``Sampler.close``."""
        del self._model


@torch.inference_mode()
def sample(model: PreTrainedModel, sampling: Sampling, requests: Sequence[SampleRequest]) -> list[TokenIds]:
    """Samples a batch: int32 [T] for each request, with the end-of-turn token unless ``max_new_tokens`` cut it off."""
    turn_end = sampling.turn_end
    prompt_length = max(len(request.prompt_ids) for request in requests)
    input_ids = torch.full((len(requests), prompt_length), turn_end)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, prompt_length - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.copy())
        mask[row, prompt_length - len(request.prompt_ids) :] = 1
    # generate() fills what a configuration leaves open from the model's own, which may hold penalties.
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=turn_end, pad_token_id=turn_end
    )
    processors = LogitsProcessorList([_finite])
    if sampling.temperature > 0:
        uniforms = np.stack([_uniforms(sampling, request) for request in requests])
        processors.append(_InverseCdf(torch.from_numpy(uniforms), sampling.temperature, sampling.top_p, prompt_length))
    output = model.generate(  # type: ignore[operator]  # from GenerationMixin, beside PreTrainedModel
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_processor=processors,
    )
    generated = output[:, prompt_length:].cpu().numpy().astype(np.int32)
    return [_until(row, turn_end) for row in generated]


class _InverseCdf(LogitsProcessor):
    """Leaves possible only the token that a row's next uniform number picks from its top-p distribution."""

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float, prompt_length: int) -> None:
        self._uniforms = uniforms
        self._temperature = temperature
        self._top_p = top_p
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs_BV = (scores.double() / self._temperature).softmax(dim=1)
        if self._top_p < 1:
            sorted_BV, order_BV = probs_BV.sort(dim=1, descending=True, stable=True)
            outside_BV = sorted_BV.cumsum(dim=1) - sorted_BV >= self._top_p
            probs_BV = probs_BV.scatter(1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
        cdf_BV = probs_BV.cumsum(dim=1)
        uniform_B1 = self._uniforms[:, input_ids.shape[1] - self._prompt_length, None].to(scores.device)
        # The first token whose share of the distribution reaches beyond the number; it has probability.
        picked_B1 = torch.searchsorted(cdf_BV, uniform_B1 * cdf_BV[:, -1:], right=True)
        picked_B1.clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B1, 0.0)


def _finite(input_ids: Tensor, scores: Tensor) -> Tensor:
    if bool(torch.isnan(scores).any()):
        raise ModelError("the student's logits are not finite", "check the checkpoint, or use --dtype float32")
    return scores


def _uniforms(sampling: Sampling, request: SampleRequest) -> NDArray[np.float64]:
    """The uniform numbers of one response, float64 [max_new_tokens]."""
    generator = np.random.Generator(np.random.Philox(key=stream_seed(sampling, request, size=16)))
    return generator.random(sampling.max_new_tokens)


def _until(token_ids: TokenIds, turn_end: int) -> TokenIds:
    ends = np.flatnonzero(token_ids == turn_end)
    return token_ids[: ends[0] + 1] if len(ends) else token_ids
