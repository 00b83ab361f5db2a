"""Compiles the pass of `teacher_rows` for GPUs that this machine need not have; the twin of `compile_rows`.

python -m tests.kernels.compile_groups ARCHITECTURE…
"""

import json
import sys
from itertools import product

import torch
import triton
from tests.kernels.compile_rows import ALIGNED, NAMES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adpa.kernels.group_rows import NUM_WARPS, TILE, _group_rows_kernel
from adpa.kernels.teacher_rows import DTYPES, GROUP


def compile_for(architecture: int, dtype: torch.dtype, is_aligned: bool) -> dict[str, int]:
    """What the kernel takes, for rows that start at multiples of 16 elements or for any in more than 2^31."""
    types = {
        "logits_ptr": f"*{NAMES[dtype]}",
        "peaks_ptr": "*fp32",
        "logmass_ptr": "*fp32",
        "V": "i32",
        "G": "i32",
        "stride": "i32" if is_aligned else "i64",
        "GROUP": "constexpr",
        "TILE": "constexpr",
    }
    aligned = {name for name, kind in types.items() if kind[0] == "*"} | ({"V", "stride"} if is_aligned else set())
    source = ASTSource(
        _group_rows_kernel,
        types,
        constexprs={"GROUP": GROUP, "TILE": TILE},
        attrs={(number,): ALIGNED for number, name in enumerate(types) if name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    return resources(triton.compile(source, target=target, options={"num_warps": NUM_WARPS}))


if __name__ == "__main__":
    for each in product(map(int, sys.argv[1:]), DTYPES, (True, False)):
        print(json.dumps({"configuration": str(each), "architecture": each[0], **compile_for(*each)}), flush=True)
