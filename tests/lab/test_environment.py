import json

import numpy as np
import pytest

from adpa.lab.environment import (
    WORDS,
    Environment,
    Prompt,
    completion_row,
    preference_row,
    reward,
)

ENVIRONMENT = Environment()
PROMPT = Prompt("reverse", "casual", (3, 1, 4, 1, 5))


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("ascending", (1, 1, 3, 4, 5)),
        ("descending", (5, 4, 3, 1, 1)),
        ("reverse", (5, 1, 4, 1, 3)),
        ("copy", (3, 1, 4, 1, 5)),
        ("rotate", (1, 4, 1, 5, 3)),
    ],
)
def test_an_operation_has_one_answer(operation: str, answer: tuple[int, ...]) -> None:
    assert Prompt(operation, "warm", (3, 1, 4, 1, 5)).answer == answer


@pytest.mark.parametrize(
    ("response", "correctness", "greeting", "closing", "brevity"),
    [
        ("hey 5 1 4 1 3 cheers", 1, 1, 1, 1),
        ("5 1 4 1 3", 1, 0, 0, 1),
        ("greetings 5 1 4 1 3", 1, 0, 0, 4 / 5),  # the greeting of another tone is a surplus word
        ("well hey 5 1 4 1 3 regards", 1, 0, 1, 3 / 5),  # the greeting must come first
        ("hey 5 1 4 1 3 cheers um", 1, 1, 0, 3 / 5),  # the closing must come last
        ("hey 5 so 1 4 um 1 3 cheers", 1, 1, 1, 3 / 5),
        ("5 1 4 1 3 um um um um um um", 1, 0, 0, 0),
        ("5 1 4 1 8", 1 / 2 * 4 / 5, 0, 0, 1),  # one substitution
        ("5 1 4 3", 1 / 2 * 4 / 5, 0, 0, 1),  # one digit missing
        ("5 1 4 1 1 3", 1 / 2 * 5 / 6, 0, 0, 4 / 5),  # one digit too many
        ("3 1 4 1 5", 1 / 2 * 3 / 5, 0, 0, 1),  # copied, not reversed
        ("hey cheers", 0, 1, 1, 1),
        ("", 0, 0, 0, 1),
    ],
)
def test_reward_is_the_sum_of_its_parts(
    response: str, correctness: float, greeting: float, closing: float, brevity: float
) -> None:
    expected = 0.7 * correctness + 0.1 * greeting + 0.1 * closing + 0.1 * brevity
    assert reward(PROMPT, response) == pytest.approx(expected)


def test_chosen_beats_rejected_except_in_the_flipped_pairs() -> None:
    pairs = ENVIRONMENT.preference_pairs(2000, seed=0)
    margins = np.array([reward(pair.prompt, pair.chosen) - reward(pair.prompt, pair.rejected) for pair in pairs])
    assert (margins != 0).all()
    assert (margins < 0).mean() == pytest.approx(ENVIRONMENT.flipped, abs=0.02)


def test_the_same_seed_draws_the_same_and_another_seed_draws_other_data() -> None:
    assert ENVIRONMENT.preference_pairs(20, seed=3) == ENVIRONMENT.preference_pairs(20, seed=3)
    assert ENVIRONMENT.corpus(20, seed=3) == ENVIRONMENT.corpus(20, seed=3)
    assert ENVIRONMENT.evaluation_prompts(20, seed=3) == ENVIRONMENT.evaluation_prompts(20, seed=3)
    assert ENVIRONMENT.preference_pairs(20, seed=3) != ENVIRONMENT.preference_pairs(20, seed=4)


def test_drawing_leaves_the_global_generator_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    ENVIRONMENT.preference_pairs(5, seed=0)
    assert np.random.random() == expected


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert ENVIRONMENT.preference_pairs(20, seed=0)[:5] == ENVIRONMENT.preference_pairs(5, seed=0)


def test_no_evaluation_prompt_is_a_training_prompt() -> None:
    trained = {pair.prompt for pair in ENVIRONMENT.preference_pairs(500, seed=0)}
    trained |= {prompt for prompt, _ in ENVIRONMENT.corpus(500, seed=0)}
    assert trained.isdisjoint(ENVIRONMENT.evaluation_prompts(500, seed=0))


def test_every_word_is_in_the_vocabulary() -> None:
    pairs = ENVIRONMENT.preference_pairs(500, seed=0)
    texts = [text for pair in pairs for text in (pair.prompt.text, pair.chosen, pair.rejected)]
    assert {word for text in texts for word in text.split()} == set(WORDS)


def test_rows_are_conversations_in_plain_json() -> None:
    pair = ENVIRONMENT.preference_pairs(1, seed=0)[0]
    row = preference_row(pair)
    assert row == {
        "prompt": [{"role": "user", "content": pair.prompt.text}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
    assert json.loads(json.dumps(row)) == row
    assert completion_row(pair.prompt, pair.chosen) == {
        "prompt": row["prompt"],
        "completion": row["chosen"],
    }
