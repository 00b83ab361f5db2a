"""Splits a causal language model into the decoder, which returns hidden states, and the head, which returns logits.

adpa needs the head on some rows only, so it runs the two separately. The bias, softcap and scale of the head are read
from the model. ``check_head`` compares the two parts with the model's own logits, and refuses a head that does anything
else.

Shapes: B sequences, L tokens, C rows, d hidden width, V vocabulary rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.errors import HeadError

# Settings of torch.backends.cuda.matmul: no TF32, every sum in float32.
FLOAT32_PRODUCTS = {
    "fp32_precision": "ieee",
    "allow_fp16_accumulation": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_bf16_reduced_precision_reduction": False,
}


@dataclass(frozen=True)
class LmHead:
    """logits = softcap · tanh(z / softcap), or z without a softcap, with z = scale · (hidden · weightᵀ + bias).

    Attributes:
        weight: [V, d].
        bias: [V] or None.
        softcap: as in Gemma 2, or None.
        logit_scale: as in Cohere; for Granite, 1 / ``logits_scaling``.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def float(self) -> "LmHead":
        """The same head in float32."""
        return self.to(self.weight.device, torch.float32)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "LmHead":
        """The same head on a device, and in a dtype; default: its own."""
        dtype = dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Whether the dtype represents every number of the head exactly."""
        tensors = (tensor for tensor in (self.weight, self.bias) if tensor is not None)
        return all(bool((tensor.to(dtype) == tensor).all()) for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., d] to logits [..., V], in the weight's dtype."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def float32_logits(self, hidden_Cd: Tensor) -> Tensor:
        """Hidden states [C, d] in the weight's dtype to logits [C, V] in float32.

        For 16-bit weights the products are exact and the sums are float32, without a copy of the weight. This runs on
        CUDA only: elsewhere, use the head in float32.
        """
        with _float32_products():
            if self.weight.dtype == torch.float32:
                logits_CV = torch.mm(hidden_Cd, self.weight.T)
            else:
                logits_CV = torch.mm(hidden_Cd, self.weight.T, out_dtype=torch.float32)
        if self.bias is not None:
            logits_CV += self.bias
        if self.logit_scale != 1:
            logits_CV *= self.logit_scale
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV


@contextmanager
def _float32_products() -> Iterator[None]:
    """Makes CUDA multiply and add in float32, whatever the settings of the process; restores them afterwards."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in FLOAT32_PRODUCTS}
    for name in before:
        if name.endswith("reduction"):  # the setter takes (allowed, split-k), the getter gives the first
            before[name] = (before[name], getattr(matmul, f"{name}_split_k"))
    try:
        for name, value in FLOAT32_PRODUCTS.items():
            setattr(matmul, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The decoder's output after its final norm, [B, L, d]."""
    output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def read_head(model: PreTrainedModel) -> LmHead:
    """The model's head; its tensors are the model's own parameters."""
    config = model.config.get_text_config(decoder=True)
    linear = model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LmHead(linear.weight, getattr(linear, "bias", None), softcap, scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares decoder and head with the whole model on a few tokens.

    Raises:
        HeadError: they differ: the head does something that adpa does not know.
    """
    refusal = HeadError(
        f"{type(model).__name__}: its head does something that adpa does not support; known are a linear head with "
        "bias, final_logit_softcapping, logit_scale and logits_scaling"
    )
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise refusal
    training = model.training
    model.eval()
    input_ids = torch.arange(1, 9, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    mask = torch.ones_like(input_ids)
    whole = model(input_ids=input_ids, attention_mask=mask).logits.float()
    parts = read_head(model).logits(hidden_states(model, input_ids, mask)).float()
    model.train(training)
    # The operations are the same, except that Granite divides where we multiply.
    tolerance = 4 * torch.finfo(model.dtype).eps * whole.abs().amax()
    if whole.isfinite().all() and not (whole.shape == parts.shape and ((whole - parts).abs() <= tolerance).all()):
        raise refusal
