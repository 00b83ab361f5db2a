"""Measures how long preference pairs take to become tokens, and the share of each part: part of ``make bench``.

    python -m benchmarks.tokenizing --data preferences.jsonl --pairs 10000

The rows of the file are repeated up to the number of pairs. A number at the end of each text keeps them distinct. Every
round runs every part in turn. CPU seconds count all threads, so other work on the machine disturbs them least.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.encoding import text_pairs
from benchmarks.scoring import quiet

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import Encoder
from adpa.data.round_trip import check_round_trip
from adpa.data.vocabulary import load_tokenizer, token_ids
from adpa.lab.smollm2 import save_smollm2

LIMITS = (1024, 2048)  # tokens of a prompt, and of prompt and response
BATCH = 3 * 256  # texts
CHECKED = 1000  # rows whose texts are compared with their tokens

Row = tuple[str, dict[str, Any]]
Seconds = tuple[float, float]  # of the CPU, and of the clock


def main() -> None:
    """Prints a Markdown table of seconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.tokenizing")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer; default: SmolLM2's")
    parser.add_argument("--pairs", type=int, default=10_000, help="number of pairs")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds")
    arguments = parser.parse_args()
    quiet()
    lines = arguments.data.read_text().splitlines() if arguments.data else map(json.dumps, text_pairs(200))
    rows = list(itertools.islice(distinct_rows(list(map(json.loads, lines))), arguments.pairs))
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.tokenizer or Path(folder) / "smollm2"
        if arguments.tokenizer is None:
            save_smollm2(directory)
        ways = parts(directory, rows)
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(arguments.rounds)]
    print(f"{len(rows):,} pairs; median (least to most) of {arguments.rounds} rounds")
    print("| | CPU seconds | seconds |\n| --- | --: | --: |")
    for name in ways:
        cells = (spread([taken[name][clock] for taken in rounds]) for clock in range(2))
        print(f"| {name} | {' | '.join(cells)} |")


def distinct_rows(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows again and again, each time with another number at the end of every text."""
    for number, row in enumerate(itertools.cycle(rows)):
        yield f"row {number}", numbered(row, str(number // len(rows)))


def numbered(value: Any, number: str) -> Any:
    """A row, or a part of it, with a number at the end of every text; roles stay."""
    if isinstance(value, dict):
        return {key: part if key == "role" else numbered(part, number) for key, part in value.items()}
    if isinstance(value, list):
        return [numbered(part, number) for part in value]
    return f"{value} {number}" if isinstance(value, str) else value


def parts(directory: Path, rows: list[Row]) -> dict[str, Callable[[], object]]:
    """The encoder, and parts of its work on the same texts."""
    tokenizer = load_tokenizer(directory)
    encoder = Encoder(ChatTemplate(tokenizer), *LIMITS)
    conversations = [conversation for _, row in rows for conversation in conversations_of(row)]
    texts: list[Any] = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    messages = [message["content"] for conversation in conversations[: 3 * CHECKED] for message in conversation]
    return {
        "`Encoder.encode`": lambda: deque(encoder.encode(rows), maxlen=0),
        "the tokenizer's call": lambda: [tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in batches],
        "`token_ids`": lambda: [token_ids(tokenizer, batch) for batch in batches],
        f"`check_round_trip`, first {CHECKED:,} rows": lambda: check_round_trip(tokenizer, messages),
    }


def conversations_of(row: dict[str, Any]) -> Iterator[list[dict[str, str]]]:
    """A row's prompt, and the prompt with each of the responses."""
    prompt, chosen, rejected = (
        [{"role": role, "content": row[column]}] if isinstance(row[column], str) else row[column]
        for column, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    )
    yield prompt
    yield prompt + chosen
    yield prompt + rejected


def timed(way: Callable[[], object]) -> Seconds:
    """How long a part takes."""
    cpu, clock = time.process_time(), time.perf_counter()
    way()
    return time.process_time() - cpu, time.perf_counter() - clock


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
