import json
from pathlib import Path

import pytest

from adpa.lab.checkpoints import build_laboratory, encode, write_preferences
from adpa.lab.environment import Environment, preference_row
from adpa.lab.evaluate import evaluate, mean
from adpa.lab.tokenizer import TURN_END, build_tokenizer

ENVIRONMENT = Environment()


def test_only_the_response_and_its_end_of_turn_are_learned() -> None:
    tokenizer = build_tokenizer()
    texts = ENVIRONMENT.corpus(20, seed=0)
    input_ids, labels = encode(texts, tokenizer)
    assert input_ids.shape == labels.shape
    for (_, response), row in zip(texts, labels, strict=True):
        learned = tokenizer.convert_ids_to_tokens(row[row != -100].tolist())
        assert learned == [*response.split(), TURN_END]


def test_preferences_are_one_json_row_a_line(tmp_path: Path) -> None:
    pairs = ENVIRONMENT.preference_pairs(3, seed=0)
    write_preferences(pairs, tmp_path / "preferences.jsonl")
    lines = (tmp_path / "preferences.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [preference_row(pair) for pair in pairs]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dpo_betters_the_teacher_and_the_student_is_far_below(tmp_path: Path) -> None:
    laboratory = build_laboratory(tmp_path / "lab", seed=1)
    prompts = ENVIRONMENT.evaluation_prompts(300, seed=1)
    teacher, reference, student = (
        evaluate(path, prompts, seed=1) for path in (laboratory.teacher, laboratory.reference, laboratory.student)
    )
    assert mean(teacher.sampled) > mean(reference.sampled) + 0.03
    assert mean(teacher.greedy) > mean(reference.greedy) + 0.03
    assert mean(student.sampled) < mean(reference.sampled) - 0.1
