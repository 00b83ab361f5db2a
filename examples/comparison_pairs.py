"""Preference pairs from well-known sets of comparisons, which name their responses by number or letter.

UltraFeedback has several rated responses a row: the best one is chosen, the worst one rejected. Ties are left out and
counted. Run:

    python examples/comparison_pairs.py --set pku-saferlhf --output pairs.jsonl
    adpa precompute --teacher org/large-dpo --reference org/large-sft --data pairs.jsonl --cache cache
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset

Row = dict[str, Any]


def pku_saferlhf(row: Row) -> Row:
    """The better response; safer_response_id would name the safer one."""
    better = row["better_response_id"]
    return {"prompt": row["prompt"], "chosen": row[f"response_{better}"], "rejected": row[f"response_{1 - better}"]}


def shp(row: Row) -> Row:
    """Of two comments on a post, the one that readers preferred: A where labels is 1."""
    chosen, rejected = ("A", "B") if row["labels"] == 1 else ("B", "A")
    return {
        "prompt": row["history"],
        "chosen": row[f"human_ref_{chosen}"],
        "rejected": row[f"human_ref_{rejected}"],
    }


def ultrafeedback(row: Row) -> Row | None:
    """Of several responses, those with the highest and the lowest overall score; None for a tie."""
    rated = sorted(row["completions"], key=lambda completion: completion["overall_score"])
    if len(rated) < 2 or rated[0]["overall_score"] == rated[-1]["overall_score"]:
        return None
    return {"prompt": row["instruction"], "chosen": rated[-1]["response"], "rejected": rated[0]["response"]}


class Comparisons(NamedTuple):
    """A set on the Hub, and how a row of it becomes a pair."""

    name: str
    pair: Callable[[Row], Row | None]


SETS = {
    "pku-saferlhf": Comparisons("PKU-Alignment/PKU-SafeRLHF", pku_saferlhf),
    "shp": Comparisons("stanfordnlp/SHP", shp),
    "ultrafeedback": Comparisons("openbmb/UltraFeedback", ultrafeedback),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=SETS, help="the set")
    parser.add_argument("--data", help="a folder of its files (default: its name on the Hub)")
    parser.add_argument("--split", default="train", help="split to read (default: train)")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    arguments = parser.parse_args()

    name, pair = SETS[arguments.set]
    made = [pair(row) for row in load_dataset(arguments.data or name, split=arguments.split)]
    written = [one for one in made if one is not None]
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in written)
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"pairs: {len(written):,}, ties left out: {len(made) - len(written):,}")


if __name__ == "__main__":
    main()
