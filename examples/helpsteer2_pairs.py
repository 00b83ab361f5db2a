"""Preference pairs from HelpSteer2, whose rows rate one response each: two rows in a row share a prompt.

The response with the higher helpfulness is the chosen one. Ties are left out and counted. Run:

    python examples/helpsteer2_pairs.py --output helpsteer2.jsonl
    adpa precompute --teacher org/large-dpo --reference org/large-sft --data helpsteer2.jsonl --cache cache
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import load_dataset

TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")  # stands between the turns of a longer prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="nvidia/HelpSteer2", help="name on the Hub, or a folder of its files")
    parser.add_argument("--split", default="train", help="split to read (default: train)")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    arguments = parser.parse_args()

    counts: Counter[str] = Counter()
    with arguments.output.open("w", encoding="utf-8") as file:
        for pair in pairs(load_dataset(arguments.data, split=arguments.split), counts):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    print(", ".join(f"{name}: {counts[name]:,}" for name in ("pairs", "ties left out", "prompts without a pair")))


def pairs(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The pairs of rows that follow one another and share a prompt."""
    for prompt, group in groupby(rows, key=lambda row: row["prompt"]):
        rated = list(group)
        if len(rated) != 2:
            counts["prompts without a pair"] += 1
            continue
        worse, better = sorted(rated, key=lambda row: row["helpfulness"])
        if worse["helpfulness"] == better["helpfulness"]:
            counts["ties left out"] += 1
            continue
        counts["pairs"] += 1
        yield {"prompt": messages(prompt), "chosen": better["response"], "rejected": worse["response"]}


def messages(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt: the first is the user's."""
    first, *others = TURN.split(prompt)
    turns = [("User", first), *zip(others[::2], others[1::2], strict=True)]
    return [{"role": speaker.lower(), "content": text} for speaker, text in turns]


if __name__ == "__main__":
    main()
