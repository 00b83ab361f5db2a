"""The Triton pass of `adpa.kernels.teacher_rows` over the logits: one program sums up the groups of a tile of a row.

It reads the logits once and writes two numbers for each group. So a chunk takes the time that reading it takes.
Programs are independent: no loop, no barrier, no atomics.

Shapes: C rows of a chunk, V vocabulary, W tokens of a group, G groups, T groups of a tile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # groups a program: with 4 warps and groups of 64, 32 logits a thread
NUM_WARPS = 4


def group_rows(logits_CV: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """For each group of neighbours: its largest logit, and the log of its mass relative to that; [C, G] float32."""
    C, V = logits_CV.shape
    if logits_CV.stride(1) != 1:
        logits_CV = logits_CV.contiguous()
    peaks_CG = logits_CV.new_empty(C, triton.cdiv(V, group), dtype=torch.float32)
    logmass_CG = torch.empty_like(peaks_CG)
    G = peaks_CG.shape[1]
    with torch.cuda.device_of(logits_CV):
        _group_rows_kernel[(C * triton.cdiv(G, TILE),)](
            logits_CV,
            peaks_CG,
            logmass_CG,
            V,
            G,
            logits_CV.stride(0),
            GROUP=group,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
    return peaks_CG, logmass_CG


@triton.jit
def _group_rows_kernel(
    logits_ptr,  # [C, V]
    peaks_ptr,  # [C, G]
    logmass_ptr,  # [C, G]
    V,
    G,
    stride,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    tiles = tl.cdiv(G, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    groups_T = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    columns_TW = groups_T[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits_TW = tl.load(logits_ptr + row * stride + columns_TW, mask=columns_TW < V, other=-float("inf"))
    logits_TW = logits_TW.to(tl.float32)

    peaks_T = tl.max(logits_TW, axis=1)
    finite_peaks_T = tl.where(peaks_T == -float("inf"), 0.0, peaks_T)
    mass_T = tl.sum(tl.exp(logits_TW - finite_peaks_T[:, None]), axis=1)
    tl.store(peaks_ptr + row * G + groups_T, peaks_T, mask=groups_T < G)
    tl.store(logmass_ptr + row * G + groups_T, tl.log(mass_T), mask=groups_T < G)
