"""Estimates how many tokens of a batch fit into a GPU's memory when transformers runs a model.

A batch needs memory beside the weights, in proportion to its tokens. It gets half of the memory that the weights leave
free. The other half is for unknowns (gaps between allocations, the kernels' own memory) and for the loss head's chunks.
Batches have an upper limit too, beyond which they gain nothing.
"""

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from adpa.pipeline.models.attention import EAGER
from adpa.pipeline.models.checkpoint import Checkpoint

FIXED_TOKENS = 8192  # of a batch if no GPU's memory is known; otherwise the minimum
MOST_SCORING_TOKENS = 65_536  # enough to keep a GPU busy; a killed run loses one batch, which would become one file
MOST_SAMPLING_TOKENS = 262_144  # a decoding step costs about the same for one response and for hundreds
PLANNED_SHARE = 0.5
# The numbers of the model's dtype that a layer holds for each token at once.
HIDDEN_COPIES = 16  # of its width: residual, norms in float32, queries, keys, values, rotations
MLP_COPIES = 4  # of the MLP's width: gate, activation, up, product
# Bytes for each id of the vocabulary while a token is drawn: float64 probabilities, their sums, and their sorting.
DRAWING_BYTES = {False: 32, True: 96}  # without top-p, and with it


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free


def scoring_tokens(checkpoint: Checkpoint, dtype: str, free: int) -> int:
    """Tokens of a batch of scoring, padding included.

    Args:
        checkpoint: the model.
        dtype: the dtype to load it in.
        free: free bytes before it is loaded.
    """
    if checkpoint.attn_implementation == EAGER or not attends_by_sdpa(checkpoint.config):
        return FIXED_TOKENS
    itemsize = getattr(torch, dtype).itemsize
    return _fitting(
        free - checkpoint.weight_bytes(dtype), activation_bytes(checkpoint.config, itemsize), MOST_SCORING_TOKENS
    )


def sampling_tokens(checkpoint: Checkpoint, dtype: str, free: int, max_new_tokens: int, top_p: float) -> int:
    """Tokens of a batch of sampling: prompts, padding and the longest possible responses.

    Args:
        checkpoint: the model.
        dtype: the dtype to load it in.
        free: free bytes before it is loaded.
        max_new_tokens: of a response.
        top_p: of the sampling.
    """
    config, itemsize = checkpoint.config, getattr(torch, dtype).itemsize
    if not attends_by_sdpa(config):
        return FIXED_TOKENS
    drawing = DRAWING_BYTES[top_p < 1] * config.vocab_size / max_new_tokens  # once for each response
    # Prompts are read before the first draw: activations and drawing never need memory at once. Keys and values stay.
    needed = cache_bytes(config, itemsize) + max(activation_bytes(config, itemsize), drawing)
    return _fitting(free - checkpoint.weight_bytes(dtype), needed, MOST_SAMPLING_TOKENS)


def attends_by_sdpa(config: PretrainedConfig) -> bool:
    """Whether transformers computes a model's attention by sdpa. Other attention needs memory for L × L scores, too."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(model, "_supports_sdpa", False))


def activation_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes for each token in a forward pass without gradients: one layer's, as layers run one after another."""
    mlp = _largest(config, "intermediate_size", 4 * config.hidden_size)
    return itemsize * (HIDDEN_COPIES * config.hidden_size + MLP_COPIES * mlp)


def cache_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes for each token of keys and values: of every layer, and again of one layer, repeated to all query heads."""
    heads = _largest(config, "num_attention_heads", 1)
    groups = _largest(config, "num_key_value_heads", heads)
    width = max(_largest(config, "head_dim", 0), config.hidden_size // heads)
    return 2 * itemsize * width * (config.num_hidden_layers * groups + heads)


def _largest(config: PretrainedConfig, name: str, otherwise: int) -> int:
    """A size of the model: the largest if each layer has its own, ``otherwise`` if the configuration has none."""
    size: Any = getattr(config, name, None)
    return max(size) if isinstance(size, list) else size or otherwise


def _fitting(room: int, bytes_per_token: float, most: int) -> int:
    return min(max(int(PLANNED_SHARE * room / bytes_per_token), FIXED_TOKENS), most)
