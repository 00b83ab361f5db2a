"""The first prompts of the data, and what their users asked last."""

import numpy as np
import pytest
from tests.conftest import Row

from adpa.data.answers import Answers
from adpa.data.json_rows import Rows
from adpa.data.preferences import parse_pair
from adpa.data.shown_answers import ShownPrompt, first_prompts, read_questions, show_answers
from adpa.errors import RowError

ONE, TWO, THREE = (np.array([number], dtype=np.int32) for number in (1, 2, 3))
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
ROWS: list[Row] = [
    {"prompt": "First?", "chosen": "A", "rejected": "B"},
    {"prompt": TURNS, "chosen": "A", "rejected": "B"},
    {"prompt": "Third?", "chosen": "A", "rejected": "B"},
]


def test_the_first_distinct_prompts_in_the_order_of_the_data() -> None:
    prompts = [("a", ONE), ("a", ONE), ("b", ONE), ("c", TWO), ("d", THREE)]
    assert first_prompts(prompts, 0) == {}
    assert first_prompts(prompts, 2) == {ONE.tobytes(): "a", TWO.tobytes(): "c"}
    assert first_prompts(prompts, 9) == {ONE.tobytes(): "a", TWO.tobytes(): "c", THREE.tobytes(): "d"}


def test_a_question_is_the_users_last_message() -> None:
    ids = [parse_pair("", row).example_id for row in ROWS]
    rows: list[tuple[str, Row | RowError]] = [
        ("line 1", ROWS[0]),
        ("line 2", RowError("line 2: broken", "mend it", "broken")),
        ("line 3", ROWS[1]),
    ]
    assert read_questions(iter(rows), False, ids[:2]) == {ids[0]: ("First?", 1), ids[1]: ("Why?", 4)}


def test_rows_after_the_last_wanted_one_are_not_read() -> None:
    wanted = parse_pair("", ROWS[0]).example_id
    rows: Rows = iter([("line 1", ROWS[0]), ("line 2", ROWS[1])])
    assert read_questions(rows, False, [wanted]) == {wanted: ("First?", 1)}
    assert next(rows) == ("line 2", ROWS[1])


def test_a_rendered_prompt_is_shown_whole() -> None:
    row: Row = {"prompt": "user : Why ?</s>assistant : ", "chosen": "A", "rejected": "B"}
    wanted = parse_pair("", row, rendered=True).example_id
    assert read_questions(iter([("", row)]), True, [wanted]) == {wanted: (row["prompt"], 1)}


@pytest.mark.parametrize("rows", [[], ROWS])
def test_without_a_prompt_to_show_nothing_is_read(rows: list[Row]) -> None:
    left: Rows = iter([("", row) for row in rows])
    assert read_questions(left, False, []) == {}
    assert len(list(left)) == len(rows)


def test_each_prompt_has_the_first_answer_of_both_models_with_its_reward() -> None:
    def answers(reward: float) -> Answers:
        rewards = np.array([[reward, 100.0], [reward + 1, 100.0]])
        return Answers({ONE.tobytes(): TWO, TWO.tobytes(): THREE}, 0, rewards, rewards, rewards, rewards)

    shown = show_answers(
        {TWO.tobytes(): "b"}, {"b": ("Why?", 3)}, answers(3.0), answers(-3.0), lambda ids: f"<{ids.tolist()}>"
    )
    assert shown == [ShownPrompt("Why?", "<[3]>", "<[3]>", 4.0, -2.0, messages=3)]
