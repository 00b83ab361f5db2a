"""Samples with transformers.

Every response has its own stream of uniform random numbers, derived from the seed, the prompt and the response's index.
A token is drawn by inverting the cumulative distribution. So a response depends on its batch only as far as the logits
do. In float32 the logits differ by rounding, and responses are the same; in bfloat16 some responses differ.

The loop over tokens is ours. The loop of transformers waits for the device at every token, so that a GPU would idle
until the next token's work is queued. ``generate`` prepares the loop.

Shapes: B sequences of a batch, P tokens of the longest prompt, T sampled tokens, V vocabulary rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest
from adpa.data.sequences import TokenIds
from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, release_memory
from adpa.pipeline.scoring.sample import stream_seed

SYNC_FREE_SDPA = "adpa_sync_free_sdpa"


class HfSampler:
    """A ``Sampler`` on a transformers model."""

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, device: torch.device) -> None:
        self._model = checkpoint.load(sampling.dtype, device).eval()
        self._sampling = sampling
        if device.type == "cuda":
            avoid_mask_sync(self._model)

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """See ``Sampler.sample``."""
        return (sample(self._model, self._sampling, batch) for batch in batches)

    def close(self) -> None:
        """See ``Sampler.close``."""
        del self._model
        release_memory()


@torch.inference_mode()
def sample(model: PreTrainedModel, sampling: Sampling, requests: Sequence[SampleRequest]) -> list[TokenIds]:
    """Samples a response to each request, int32 [T]. It has no end-of-turn token if ``max_new_tokens`` cut it off.

    Raises:
        ModelError: the logits are not finite.
    """
    turn_end = sampling.turn_end
    prompt_length = max(len(request.prompt_ids) for request in requests)
    input_ids = torch.full((len(requests), prompt_length), turn_end)
    mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, prompt_length - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.copy())
        mask[row, prompt_length - len(request.prompt_ids) :] = 1
    uniforms_BT = None
    if sampling.temperature > 0:
        uniforms = np.stack([_uniforms(sampling, request) for request in requests])
        uniforms_BT = torch.from_numpy(uniforms).to(model.device)
    # generate() takes missing settings from the model's own configuration: replace it.
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=turn_end, pad_token_id=turn_end
    )
    generated_BT, finite = model.generate(  # type: ignore[operator]  # from GenerationMixin, beside PreTrainedModel
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        custom_generate=partial(_decode, sampling=sampling, uniforms_BT=uniforms_BT),
    )
    if not finite:
        raise ModelError("the student's logits are not finite", "check the checkpoint, or use --dtype float32")
    return [_cut_after(row, turn_end) for row in generated_BT.cpu().numpy().astype(np.int32)]


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    sampling: Sampling,
    uniforms_BT: Tensor | None,
    logits_processor: object,
    stopping_criteria: object,
    generation_config: object,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The token loop, called by ``generate``: int64 [B, T], and whether all logits were finite. Ended rows are padded.

    ``generate`` also passes the model's own logits processors and stopping criteria. The loop ignores them.
    """
    check_interval = steps_between_checks(input_ids.device)
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    finite = torch.ones((), dtype=torch.bool, device=input_ids.device)
    prompt_length = input_ids.shape[1]
    for step in range(sampling.max_new_tokens):
        output = model(
            **model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if step else None, is_first_iteration=step == 0, **inputs
            ),
            return_dict=True,
        )
        inputs = model._update_model_kwargs_for_generation(output, inputs)
        logits_BV = output.logits[:, -1]
        finite &= logits_BV.amax(dim=1).isfinite().all()  # sampling goes on; the caller raises
        if uniforms_BT is None:
            tokens_B = logits_BV.argmax(dim=1)
        else:
            tokens_B = draw(logits_BV, uniforms_BT[:, step], sampling.temperature, sampling.top_p)
        del output, logits_BV  # some models return the logits of the whole prompt
        tokens_B = tokens_B.masked_fill(ended_B, sampling.turn_end)
        ended_B |= tokens_B == sampling.turn_end
        input_ids = torch.cat([input_ids, tokens_B[:, None]], dim=1)
        if (step + 1) % check_interval == 0 and bool(ended_B.all()):
            break
    return input_ids[:, prompt_length:], finite


def steps_between_checks(device: torch.device) -> int:
    """Tokens between two checks whether all responses have ended. At each check the host waits for the device."""
    return 16 if device.type == "cuda" else 1


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a token of each row from its top-p distribution by the row's uniform number, int64 [B].

    It is the first token at which the cumulative probability exceeds the number. Its own probability is not 0.
    """
    probs_BV = logits_BV.double().div_(temperature).softmax(dim=1)
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=1, descending=True, stable=True)
        outside_BV = sorted_BV.cumsum(dim=1) - sorted_BV >= top_p
        probs_BV = probs_BV.scatter(1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    cdf_BV = probs_BV.cumsum(dim=1)
    picked_B1 = torch.searchsorted(cdf_BV, uniforms_B[:, None] * cdf_BV[:, -1:], right=True)
    return picked_B1[:, 0].clamp_(max=logits_BV.shape[1] - 1)


def avoid_mask_sync(model: PreTrainedModel) -> None:
    """Removes a wait of the host at every token: the mask function of sdpa checks whether the whole mask is true.

    With padding on the left the mask never is.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SYNC_FREE_SDPA, sdpa_attention_forward)
        AttentionMaskInterface.register(SYNC_FREE_SDPA, _sync_free_mask)
        model.set_attn_implementation(SYNC_FREE_SDPA)


def _sync_free_mask(*, attention_mask: Tensor | None, allow_is_causal_skip: bool, **options: Any) -> Tensor | None:
    """The mask function of sdpa without the check. ``generate`` passes no mask for a batch without padding."""
    skip = allow_is_causal_skip and attention_mask is None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=skip, **options)
    return mask


def _uniforms(sampling: Sampling, request: SampleRequest) -> NDArray[np.float64]:
    """The uniform random numbers of one response, float64 [max_new_tokens]."""
    generator = np.random.Generator(np.random.Philox(key=stream_seed(sampling, request, size=16)))
    return generator.random(sampling.max_new_tokens)


def _cut_after(token_ids: TokenIds, turn_end: int) -> TokenIds:
    ends = np.flatnonzero(token_ids == turn_end)
    return token_ids[: ends[0] + 1] if len(ends) else token_ids
