from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.tokenizing import conversations_of, distinct_rows, parts
from transformers import PreTrainedTokenizerBase

USER, ASSISTANT = ({"role": role, "content": role} for role in ("user", "assistant"))


def test_rows_repeat_with_a_number_at_the_end_of_every_text() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": [ASSISTANT], "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f"},
    ]
    assert list(islice(distinct_rows(rows), 3)) == [
        ("row 0", {"prompt": "a 0", "chosen": [{"role": "assistant", "content": "assistant 0"}], "rejected": "c 0"}),
        ("row 1", {"prompt": "d 0", "chosen": "e 0", "rejected": "f 0"}),
        ("row 2", {"prompt": "a 1", "chosen": [{"role": "assistant", "content": "assistant 1"}], "rejected": "c 1"}),
    ]


def test_a_row_is_three_conversations() -> None:
    row = {"prompt": [USER], "chosen": "assistant", "rejected": [ASSISTANT]}
    assert list(conversations_of(row)) == [[USER], [USER, ASSISTANT], [USER, ASSISTANT]]


def test_every_part_runs(small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    rows = list(islice(distinct_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}]), 2))
    ways = parts(tmp_path, rows)
    assert ways["`token_ids`"]() == ways["the tokenizer's call"]()
    assert [way() for name, way in ways.items() if "check" in name] == [{}]
