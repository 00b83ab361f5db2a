"""docs/format.md is complete: a reader written from it alone reads every number that adpa reads."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adpa.data.cache.signals import read_scorings, read_signals

CACHE = Path(__file__).parent / "frozen" / "2"

Numbers = list[Any]


def grid() -> list[float]:
    """The log-probabilities of the codes of the encoding ``rounded``."""
    depths = [0.0]
    while depths[-1] < 128:
        depths.append(depths[-1] + min(0.5, 2**-12 * math.exp(depths[-1])))
    return depths


GRID = grid()


def numbers(packed: bytes, form: str, count: int) -> Numbers:
    """An array: its bytes by significance."""
    width = struct.calcsize(form)
    planes = pa.Codec("zstd").decompress(packed, count * width, asbytes=True)
    return [struct.unpack(form, bytes(planes[byte * count + n] for byte in range(width)))[0] for n in range(count)]


def by_token(values: Numbers, counts: list[int], top_k: int) -> list[Numbers]:
    """Numbers that are stored by rank, as a list for each token."""
    rows: list[Numbers] = [[] for _ in counts]
    stored = iter(values)
    for rank in range(top_k):
        for token, count in enumerate(counts):
            if rank < count:
                rows[token].append(next(stored))
    assert next(stored, None) is None
    return rows


def undone(differences: list[Numbers]) -> list[Numbers]:
    return [[sum(row[: rank + 1]) % 2**16 for rank in range(len(row))] for row in differences]


def decode(row: dict[str, Any], encoding: str, top_k: int) -> dict[str, Any]:
    """A row of a compact table."""
    tokens = row["tokens"]
    per_token = "<e" if encoding == "rounded" else "<f"
    decoded: dict[str, Any] = {
        name: None if row[name] is None else numbers(row[name], per_token, tokens)
        for name in ("token_logprobs", "token_advantages", "tail_logprob")
    }
    counts = [top_k] * tokens if row["topk_counts"] is None else numbers(row["topk_counts"], "<I", tokens)
    entries = sum(counts)
    decoded["topk_ids"] = by_token(numbers(row["topk_ids"], "<i", entries), counts, top_k)
    codes = undone(by_token(numbers(row["topk_logprobs"], "<H", entries), counts, top_k))
    if encoding == "exact":
        bits = [[struct.pack("<H", code) for code in row] for row in codes]
        decoded["topk_logprobs"] = [[struct.unpack("<e", two)[0] for two in row] for row in bits]
        advantages = row["topk_advantages"]
        decoded["topk_advantages"] = advantages and by_token(numbers(advantages, "<e", entries), counts, top_k)
    else:
        decoded["topk_logprobs"] = [[-GRID[code] for code in row] for row in codes]
        stored = by_token(numbers(row["topk_advantages"], "<I", entries), counts, top_k)
        decoded["topk_advantages"] = [
            [
                (n // 2 if n % 2 == 0 else -(n + 1) // 2) * min(0.5, 2**-5 * math.exp(GRID[code] / 2))
                for n, code in zip(row, row_codes, strict=True)
            ]
            for row, row_codes in zip(stored, codes, strict=True)
        ]
    return decoded


@pytest.mark.parametrize("scoring", list(read_scorings(CACHE)), ids=lambda scoring: scoring.id)
def test_a_reader_written_from_the_document_reads_the_same(scoring: Any) -> None:
    signals = read_signals(CACHE, scoring)
    expected = {row.key: row for row in map(signals.row, range(len(signals)))}
    read = 0
    for path in sorted((CACHE / "scorings" / scoring.id).glob("signals-*.arrow")):
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        how = json.loads(table.schema.metadata[b"adpa"])
        for row in table.to_pylist():
            adpa_row, decoded = expected[row["key"]], decode(row, how["encoding"], how["top_k"])
            for name, actual in decoded.items():
                stored = getattr(adpa_row, name)
                if actual is None:
                    assert stored is None
                elif stored.ndim == 1:
                    assert actual == stored.tolist()
                else:
                    for ours, theirs in zip(actual, stored, strict=True):
                        np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=1e-6)
                        padding = {"topk_ids": -1, "topk_logprobs": -np.inf, "topk_advantages": 0}[name]
                        assert (theirs[len(ours) :] == padding).all()
            read += 1
    assert read == len(expected) > 0
