"""Samples with transformers.

Every response has its own stream of uniform random numbers, derived from the seed, the prompt and the response's index.
A token is drawn by inverting the cumulative distribution. So a response depends on its batch only as far as the logits
do. In float32 the logits differ by rounding, and responses are the same; in bfloat16 some responses differ. A model
whose logits depend on padding gets none.

The loop over tokens is ours. The loop of transformers waits for the device at every token, so that a GPU would idle
until the next token's work is queued. ``generate`` prepares the loop.

Shapes: B sequences of a batch, P tokens of the longest prompt, T sampled tokens, V vocabulary rows.
"""

from collections.abc import Callable, Iterator, Sequence
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
from adpa.data.sequences import TokenIds, TokenSequence
from adpa.errors import ModelError, first_line
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import release_memory
from adpa.pipeline.models.padding import Grouping, choose_grouping, finite_rows, in_groups, nearly_same, trial_sequences
from adpa.pipeline.scoring.hf_scorer import hf_scorer
from adpa.pipeline.scoring.sample import SharedSampler, stream_seed
from adpa.pipeline.scoring.scorer_head import HeadScorer

SYNC_FREE_SDPA = "adpa_sync_free_sdpa"
ANOTHER = "use --engine vllm if it runs the model, or another student"

# From the number of a step and its logits [B, V] to the tokens [B].
Choose = Callable[[int, Tensor], Tensor]


class HfSampler(SharedSampler):
    """A ``Sampler`` on a transformers model.

    Raises:
        ModelError: the model cannot be loaded, or cannot continue a prompt token by token.
    """

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, device: torch.device) -> None:
        self._model = checkpoint.load(sampling.dtype, device).eval()
        self._name = checkpoint.name
        self._sampling = sampling
        self._attention = str(self._model.config._attn_implementation)
        if device.type == "cuda":
            avoid_mask_sync(self._model)
        self._grouping = prompt_grouping(self._model)

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """See ``Sampler.sample``."""
        together = partial(sample, self._model, self._sampling)
        return (in_groups(self._grouping, batch, _prompt_length, together) for batch in batches)

    def as_scorer(self) -> HeadScorer:
        """See ``SharedSampler.as_scorer``."""
        if self._model.config._attn_implementation != self._attention:  # as it was loaded
            self._model.set_attn_implementation(self._attention)
        return hf_scorer(self._name, self._model)

    def close(self) -> None:
        """See ``Sampler.close``."""
        del self._model
        release_memory()


@torch.inference_mode()
def sample(model: PreTrainedModel, sampling: Sampling, requests: Sequence[SampleRequest]) -> list[TokenIds]:
    """Samples a response to each request, int32 [T]: up to the first of ``sampling.ends``, or ``max_new_tokens``.

    Raises:
        ModelError: the logits are not finite.
    """
    uniforms_BT = None
    if sampling.temperature > 0:
        uniforms = np.stack([_uniforms(sampling, request) for request in requests])
        uniforms_BT = torch.from_numpy(uniforms).to(model.device)

    def choose(step: int, logits_BV: Tensor) -> Tensor:
        if uniforms_BT is None:
            return logits_BV.argmax(dim=1)
        return draw(logits_BV, uniforms_BT[:, step], sampling.temperature, sampling.top_p)

    prompts = [request.prompt_ids for request in requests]
    generated_BT, finite = generate(model, prompts, sampling.ends, sampling.max_new_tokens, choose)
    if not finite:
        raise ModelError("the student's logits are not finite", "check the checkpoint, or use --dtype float32")
    return [cut_after(row, sampling.ends) for row in generated_BT.cpu().numpy().astype(np.int32)]


@torch.inference_mode()
def prompt_grouping(model: PreTrainedModel) -> Grouping:
    """How prompts are batched, after a trial of two tokens.

    Raises:
        ModelError: token by token, the logits are not those of the whole sequence at once, as scoring reads them.
    """
    trial = trial_sequences(model)
    compute = partial(_logits_by_steps, model)
    try:
        by_steps = finite_rows([compute([sequence])[0] for sequence in trial])
        at_once = finite_rows([_logits_at_once(model, sequence) for sequence in trial])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(f"{type(model).__name__}: transformers cannot sample from it: {reason}", ANOTHER) from error
    if not nearly_same(model, by_steps, at_once):
        raise ModelError(
            f"{type(model).__name__}: token by token it has other logits than for a whole sequence at once", ANOTHER
        )
    return choose_grouping(model, trial, _prompt_length, compute)


def _logits_by_steps(model: PreTrainedModel, batch: Sequence[TokenSequence]) -> list[Tensor]:
    """For each sequence, the logits after the prompt and after one more token, [2, V]."""
    logits: list[Tensor] = []
    firsts_B = torch.tensor([int(sequence.response_ids[0]) for sequence in batch], device=model.device)

    def record(_: int, logits_BV: Tensor) -> Tensor:
        logits.append(logits_BV.clone())
        return firsts_B

    generate(model, [sequence.prompt_ids for sequence in batch], (), 2, record)
    return list(torch.stack(logits, dim=1))


def _logits_at_once(model: PreTrainedModel, sequence: TokenSequence) -> Tensor:
    """The same by one call of the model."""
    ids = np.append(sequence.prompt_ids, sequence.response_ids[:1]).astype(np.int64)
    input_ids = torch.from_numpy(ids)[None].to(model.device)
    logits: Tensor = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    return logits[0, -2:]


def _prompt_length(item: SampleRequest | TokenSequence) -> int:
    return len(item.prompt_ids)


def generate(
    model: PreTrainedModel, prompts: Sequence[TokenIds], ends: Sequence[int], max_new_tokens: int, choose: Choose
) -> tuple[Tensor, Tensor]:
    """Continues prompts by the tokens that ``choose`` takes, until each has one of ``ends``.

    Returns:
        The tokens, int64 [B, T], with anything after the end of a row; and whether all logits were finite.
    """
    prompt_length = max(map(len, prompts))
    filler = ends[0] if ends else 0  # any token
    input_ids = torch.full((len(prompts), prompt_length), filler)
    mask = torch.zeros_like(input_ids)
    for row, prompt_ids in enumerate(prompts):
        input_ids[row, prompt_length - len(prompt_ids) :] = torch.from_numpy(prompt_ids.copy())
        mask[row, prompt_length - len(prompt_ids) :] = 1
    # generate() takes missing settings from the model's own configuration: replace it.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=filler
    )
    generated: tuple[Tensor, Tensor] = model.generate(  # type: ignore[operator]  # of GenerationMixin
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        custom_generate=partial(
            _decode, ends=torch.tensor(ends, device=model.device), max_new_tokens=max_new_tokens, choose=choose
        ),
    )
    return generated


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    ends: Tensor,
    max_new_tokens: int,
    choose: Choose,
    logits_processor: object,
    stopping_criteria: object,
    generation_config: object,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The token loop, called by transformers' ``generate``. Its result is that of ours.

    transformers also passes the model's own logits processors and stopping criteria. The loop ignores them.
    """
    check_interval = steps_between_checks(input_ids.device)
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    finite = torch.ones((), dtype=torch.bool, device=input_ids.device)
    prompt_length = input_ids.shape[1]
    for step in range(max_new_tokens):
        output = model(
            **model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if step else None, is_first_iteration=step == 0, **inputs
            ),
            return_dict=True,
        )
        inputs = model._update_model_kwargs_for_generation(output, inputs)
        logits_BV = output.logits[:, -1]
        finite &= logits_BV.amax(dim=1).isfinite().all()  # sampling goes on; the caller raises
        tokens_B = choose(step, logits_BV)
        del output, logits_BV  # some models return the logits of the whole prompt
        ended_B |= (tokens_B[:, None] == ends).any(dim=1)
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


def cut_after(token_ids: TokenIds, ends: Sequence[int]) -> TokenIds:
    """The tokens up to the first of the ends; all of them if they have none."""
    places = np.flatnonzero(np.isin(token_ids, ends))
    return token_ids[: places[0] + 1] if len(places) else token_ids
