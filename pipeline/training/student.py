"""The student in training: decoder, selection of the rows that count, loss head.

Shapes: B sequences, L tokens of the longest, d hidden size, N response tokens.
"""

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from adpa.kernels.head import HeadLosses, distill_head
from adpa.kernels.student_statistics import StudentStatistics, student_statistics
from adpa.pipeline.models.lm_head import check_head, hidden_states, read_head
from adpa.pipeline.models.packed_attention import packed_hidden_states

# The decoder's tensors beside input_ids: the first for padded sequences, the others for packed ones.
DECODER = ("attention_mask", "position_ids", "query_starts", "key_starts", "key_places", "lengths")


def attach_distill_head(model: PreTrainedModel) -> None:
    """Makes ``model(**batch)`` return the weighted loss and its parts instead of logits.

    The batch has the tensors of ``adpa.data.batches.collate``; packed ones need ``allow_packing`` first. In place of
    ``part`` it has the three per-row weights of ``distill_head``. With ``observe=True``, and without labels, tail and
    weights, the call returns the ``student_statistics`` of the same rows.

    The loss is the model's own forward method, so that every wrapper of a forward works as for any other model: mixed
    precision, data parallelism, sharding, gradient checkpointing.

    Raises:
        ModelError: the model's head does something that adpa does not support.
    """
    check_head(model)
    model.forward = MethodType(_forward, model)


def _forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    predicts: Tensor,
    observe: bool = False,
    **rows: Any,
) -> tuple[Tensor, HeadLosses] | StudentStatistics:
    decoder = {name: rows.pop(name) for name in DECODER if name in rows}
    hidden_BLd = (hidden_states if "attention_mask" in decoder else packed_hidden_states)(model, input_ids, **decoder)
    hidden_Nd = hidden_BLd.flatten(0, 1)[predicts]
    linear = model.get_output_embeddings()
    if isinstance(linear, FSDPModule):
        linear.unshard()  # FSDP gathers its weight when it is called, and nothing calls it
    head = read_head(model)
    if torch.is_autocast_enabled(hidden_Nd.device.type):
        dtype = torch.get_autocast_dtype(hidden_Nd.device.type)
        hidden_Nd = hidden_Nd.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias)
    return (student_statistics if observe else distill_head)(
        hidden_Nd,
        head.weight,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        **rows,
    )
