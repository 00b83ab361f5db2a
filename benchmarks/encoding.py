"""Measures the size of signals and the speed of reading them, for each encoding: part of ``make bench``.

    python -m benchmarks.encoding --data preferences.jsonl

SmolLM2-135M's real weights score responses with K = 50. The reference is SmolLM2 with noise on its weights, so that
advantages deviate by about one nat. For a larger vocabulary, the same signals get new ids: ids from 8,192 on, the rarer
tokens, are spread at random over 128,256. Rows are read in random order into the arrays of a batch. Every round reads
every encoding, and ratios compare times of the same round.

"JSON lists" is the format of the paper's code (see ``benchmarks.scoring``): indices and values of teacher and
reference. "Parquet" stores byte planes (byte stream split) with zstd, and a row group for each row.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from benchmarks.scoring import quiet
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from adpa.data.cache.compact import ARRAYS, compact_table
from adpa.data.cache.rounding import advantage_errors, kl_errors
from adpa.data.cache.shards import serialize
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals
from adpa.lab.smollm2 import save_smollm2
from adpa.pipeline.precompute import precompute

TOP_K = 50
NOISE = 0.06  # of a matrix's deviation
FREQUENT, LARGER_VOCABULARY = 8192, 128_256
PLAIN, COMPACT, LOSSY = "plain (version 1)", "compact", "compact, --lossy"
MOST_COMPACT, MOST_LOSSY, MOST_KL = 260, 140, 1e-3

Read = Callable[[int], SignalRow]


@dataclass(frozen=True)
class Encoded:
    """Rows in one encoding: their size in bytes, and a function that reads a row."""

    size: int
    read: Read


def main() -> None:
    """Scores, encodes, reads, and prints a table for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.encoding")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    parser.add_argument("--pairs", type=int, default=24, help="number of scored pairs")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed rounds")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        rows = scored_rows(Path(folder), arguments.data, arguments.pairs)
    rows = [replace(row, key=number.to_bytes(16, "big")) for number, row in enumerate(rows)]
    for vocabulary, signals in (("49,152 ids", rows), ("128,256 ids, made up", list(map(larger_vocabulary, rows)))):
        encodings = encode(signals)
        print_table(vocabulary, signals, encodings, measure(encodings, len(rows), arguments.rounds))


def scored_rows(folder: Path, data: Path | None, pairs: int) -> list[SignalRow]:
    """The signals of chosen and rejected responses, log-probabilities and advantages in float16."""
    teacher, reference, preferences = folder / "teacher", folder / "reference", folder / "preferences.jsonl"
    save_smollm2(teacher)
    save_noisy(teacher, reference)
    lines = data.read_text().splitlines() if data else list(map(json.dumps, text_pairs(pairs)))
    preferences.write_text("\n".join(lines[:pairs]))
    precompute(
        teacher=str(teacher),
        reference=str(reference),
        data=str(preferences),
        cache=folder / "cache",
        engine="hf",
        top_k=TOP_K,
        max_prompt_length=128,
        max_length=384,
    )
    (scoring,) = read_scorings(folder / "cache")
    signals = read_signals(folder / "cache", scoring)
    return [signals.row(number) for number in range(len(signals))]


def save_noisy(source: Path, directory: Path) -> None:
    """Saves a copy of a checkpoint with noise on its matrices."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.add_(NOISE * weight.std() * torch.randn_like(weight))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def text_pairs(count: int) -> list[dict[str, str]]:
    """Pairs whose responses are pieces of the repository's own texts."""
    root = Path(__file__).resolve().parents[1]
    text = "\n".join(path.read_text() for path in (root / "LICENSE", root / "README.md", root / "docs/laboratory.md"))
    starts = np.random.default_rng(0).integers(0, len(text) - 2100, count).tolist()
    return [
        {
            "prompt": text[start : start + 100],
            "chosen": text[start + 100 : start + 1100].strip(),  # its white space would merge with the chat template's
            "rejected": text[start + 1100 : start + 2100].strip(),
        }
        for start in starts
    ]


def larger_vocabulary(row: SignalRow) -> SignalRow:
    """The same signals with the ids of a vocabulary of 128,256 tokens."""
    random = np.random.default_rng(int.from_bytes(row.key, "big"))
    share = (LARGER_VOCABULARY - FREQUENT) / (49152 - FREQUENT)
    spread = FREQUENT + np.floor((row.topk_ids - FREQUENT + random.random(row.topk_ids.shape)) * share)
    return replace(row, topk_ids=np.where(row.topk_ids < FREQUENT, row.topk_ids, spread).astype(np.int32))


def encode(rows: Sequence[SignalRow]) -> dict[str, Encoded]:
    """The rows in every encoding."""
    encoded = {"JSON lists, as the paper's code": json_lists(rows)}
    tables = {
        PLAIN: plain_table(rows, plain_schema(TOP_K)),
        COMPACT: compact_table(rows, TOP_K, lossy=False),
        LOSSY: compact_table(rows, TOP_K, lossy=True),
        "compact, --top-p 0.95": compact_table([keep_nucleus(row, 0.95) for row in rows], TOP_K, lossy=False),
    }
    encoded |= {name: Encoded(serialize(table).size, SignalTable([table]).row) for name, table in tables.items()}
    return encoded | {"Parquet, a row a group": parquet(rows)}


def json_lists(rows: Sequence[SignalRow]) -> Encoded:
    """Two lines of JSON for each row."""
    lines: list[str] = []
    for row in rows:
        assert row.topk_advantages is not None
        reference = np.exp(row.topk_logprobs.astype(np.float32) - row.topk_advantages)
        for values in (np.exp(row.topk_logprobs.astype(np.float32)), reference):
            tokens = [
                {"indices": ids, "values": kept, "remaining_probs_sum": 1 - sum(kept)}
                for ids, kept in zip(row.topk_ids.tolist(), values.tolist(), strict=True)
            ]
            lines.append(json.dumps({"index": len(lines), "compressed_probs": tokens}))

    def read(number: int) -> SignalRow:
        teacher, reference = (json.loads(line)["compressed_probs"] for line in lines[2 * number : 2 * number + 2])
        logprobs = np.log(np.array([token["values"] for token in teacher], np.float32))
        rest = np.log(np.array([token["remaining_probs_sum"] for token in teacher], np.float32))
        ids = np.array([token["indices"] for token in teacher], np.int32)
        advantages = logprobs - np.log(np.array([token["values"] for token in reference], np.float32))
        return SignalRow(bytes(16), logprobs[:, 0], ids, logprobs, rest, advantages[:, 0], advantages)

    return Encoded(sum(map(len, lines)), read)


def parquet(rows: Sequence[SignalRow]) -> Encoded:
    """A Parquet file of plain lists."""
    table = plain_table(rows, plain_schema(TOP_K))
    floats = [f"{name}.list.element" for name in ("token_logprobs", "token_advantages", "tail_logprob")]
    halves = [f"{name}.list.element.list.element" for name in ("topk_logprobs", "topk_advantages", "topk_ids")]
    sink = io.BytesIO()
    pq.write_table(
        table, sink, row_group_size=1, compression="zstd", use_dictionary=False, use_byte_stream_split=floats + halves
    )
    file = pq.ParquetFile(sink)
    return Encoded(len(sink.getvalue()), lambda number: SignalTable([file.read_row_group(number)]).row(0))


def measure(encodings: dict[str, Encoded], count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to read all rows in random order, for each encoding and round; a first round warms up."""
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in encodings}
    for _ in range(rounds + 1):
        order = generator.permutation(count).tolist()
        for name, encoded in encodings.items():
            started = time.perf_counter()
            for number in order:
                touch(encoded.read(number))
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def touch(row: SignalRow) -> None:
    """Copies a row as the collator does."""
    for values in (row.topk_ids, row.topk_logprobs, row.topk_advantages, row.tail_logprob):
        assert values is not None
        np.empty(values.shape, np.int32 if values.dtype == np.int32 else np.float32)[...] = values


def print_table(
    vocabulary: str, rows: Sequence[SignalRow], encodings: dict[str, Encoded], seconds: dict[str, list[float]]
) -> None:
    """Prints sizes, speeds, errors of the lossy encoding, and whether the goals are met."""
    tokens = sum(len(row.topk_ids) for row in rows)
    deviation = float(np.std(np.concatenate([np.asarray(row.topk_advantages, np.float64) for row in rows])))
    print(
        f"{vocabulary}: {len(rows)} responses, {tokens:,} tokens, K = {TOP_K}, teacher and reference (advantages "
        f"deviate by {deviation:.2f} nats); {torch.get_num_threads()} threads; median (least to most) of "
        f"{len(seconds[PLAIN])} rounds"
    )
    table = Table("encoding", "bytes/token", "tokens/s, shuffled", "speed, plain = 1")
    for name, encoded in encodings.items():
        ratios = [plain / taken for plain, taken in zip(seconds[PLAIN], seconds[name], strict=True)]
        table.add_row(
            name,
            f"{encoded.size / tokens:,.1f}",
            f"{tokens / statistics.median(seconds[name]):,.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    Console(width=120).print(table)
    for name, lossy in ((COMPACT, False), (LOSSY, True)):
        columns = compact_table(rows, TOP_K, lossy).select([field.name for field in ARRAYS]).to_pydict()
        weights = {column: sum(len(value or b"") for value in values) / tokens for column, values in columns.items()}
        print(f"{name}: " + ", ".join(f"{column} {weight:.1f}" for column, weight in weights.items() if weight))
    pairs = [(row, encodings[LOSSY].read(number)) for number, row in enumerate(rows)]
    errors = np.abs(np.concatenate([kl_errors(*pair) for pair in pairs]))
    advantages = np.concatenate([advantage_errors(*pair) for pair in pairs]).mean()
    sizes = {name: encodings[name].size / tokens for name in (COMPACT, LOSSY)}
    print(
        f"{LOSSY}: |ΔKL| {errors.mean():.1e} nats a token in the mean, {np.quantile(errors, 0.99):.1e} in the 99th "
        f"percentile, {errors.max():.1e} at most; Σ p·|ΔA| {advantages:.1e} nats a token"
    )
    for what, value, most in (
        (f"{COMPACT}, bytes/token", sizes[COMPACT], MOST_COMPACT),
        (f"{LOSSY}, bytes/token", sizes[LOSSY], MOST_LOSSY),
        (f"{LOSSY}, mean |ΔKL|", errors.mean(), MOST_KL),
    ):
        print(f"{what}: {value:.4g}; goal, at most {most:g}: {'met' if value <= most else 'missed'}")


if __name__ == "__main__":
    main()
