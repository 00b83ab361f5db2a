"""The terms of the loss by their definition: one sequence at a time, over the whole vocabulary."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.sequences import TokenSequence


def dense_terms(model: PreTrainedModel, sequence: TokenSequence, row: SignalRow) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, KL and advantage term of a sequence, each a sum over its response tokens, with the signals as stored."""
    whole = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    logq = model(input_ids=whole[None]).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
    ids = torch.from_numpy(row.topk_ids.astype(np.int64))
    logp = torch.from_numpy(row.topk_logprobs.astype(np.float64))
    tail = torch.from_numpy(row.tail_logprob.astype(np.float64))
    assert row.topk_advantages is not None
    gain = torch.from_numpy(row.topk_advantages.astype(np.float64))
    logq_topk = logq.gather(1, ids)
    logq_tail = logq.scatter(1, ids, -torch.inf).logsumexp(1)
    nll = -logq.gather(1, torch.from_numpy(sequence.response_ids.astype(np.int64))[:, None]).sum()
    kl = (logp.exp() * (logp - logq_topk)).sum() + (tail.exp() * (tail - logq_tail)).sum()
    return nll, kl, -(logq_topk.exp() * gain).sum()
