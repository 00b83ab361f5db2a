"""Well-known preference sets, with their own columns: which are pairs as they are, and which need one ``--map``."""

import pytest
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row
from tests.data.pairs import explicit

from adpa.data.column_map import parse_map, rename_rows
from adpa.data.preferences import parse_pair

ASKED, BETTER, WORSE = QUESTION["content"], CHOSEN["content"], REJECTED["content"]
WHOLE = {"chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, REJECTED]}
HH = {
    "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {BETTER}",
    "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {WORSE}",
}

AS_THEY_ARE: dict[str, Row] = {
    "Anthropic/hh-rlhf": HH,
    "Dahoas/full-hh-rlhf": {
        "prompt": f"\n\nHuman: {ASKED}\n\nAssistant:",
        "response": f" {BETTER}",
        "chosen": BETTER,
        "rejected": WORSE,
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": ASKED,
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        **WHOLE,
        "messages": WHOLE["chosen"],
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    },
    "argilla/ultrafeedback-binarized-preferences-cleaned": {
        "source": "evol_instruct",
        "prompt": ASKED,
        "chosen": WHOLE["chosen"],
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected": WHOLE["rejected"],
        "rejected-rating": 2.5,
        "rejected-model": "alpaca-7b",
    },
    "argilla/dpo-mix-7k": {"dataset": "argilla/x", **WHOLE, "chosen_rating": 5.0, "rejected_rating": 2.0},
    "trl-lib/ultrafeedback_binarized": {**WHOLE, "score_chosen": 8.5, "score_rejected": 4.0},
    "llamafactory/DPO-En-Zh-20k": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": BETTER},
        "rejected": {"from": "gpt", "value": WORSE},
    },
}
MAPPED: dict[str, tuple[str, Row]] = {
    "argilla/ultrafeedback-binarized-preferences": (
        "prompt=instruction,chosen=chosen_response,rejected=rejected_response",
        {
            "source": "evol_instruct",
            "instruction": ASKED,
            "chosen_response": BETTER,
            "rejected_response": WORSE,
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 2.5,
            "chosen_model": "gpt-4",
        },
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "prompt=input",
        {"system": "", "input": ASKED, "chosen": BETTER, "rejected": WORSE, "chosen_score": 9.0, "status": "swapped"},
    ),
    "Intel/orca_dpo_pairs": (
        "prompt=question",
        {"system": "", "question": ASKED, "chosen": BETTER, "rejected": WORSE},
    ),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_a_known_set_is_read_as_it_is(name: str) -> None:
    assert parse_pair("here", AS_THEY_ARE[name]) == parse_pair("here", explicit([QUESTION]))


def test_the_turns_of_capybara_are_its_whole_conversations() -> None:
    """argilla/distilabel-capybara-dpo-7k-binarized; `prompt` is the last question alone."""
    turns = [*EARLIER_TURN, QUESTION]
    row = {
        "source": "Airoboros",
        "conversation": [{"input": "Hello.", "output": "Hi!"}, {"input": ASKED, "output": BETTER}],
        "original_response": BETTER,
        "generation_prompt": ["a", "b"],
        "raw_generation_responses": ["a", "b"],
        "new_generations": ["a", "b"],
        "prompt": ASKED,
        "chosen": [*turns, CHOSEN],
        "rejected": [*turns, REJECTED],
        "rating_chosen": 5,
        "rating_rejected": 4,
        "chosen_model": "a",
        "rejected_model": "b",
    }
    assert parse_pair("here", row) == parse_pair("here", explicit(turns))


@pytest.mark.parametrize("name", MAPPED)
def test_a_known_set_needs_one_map(name: str) -> None:
    columns, row = MAPPED[name]
    ((_, renamed),) = rename_rows(iter([("here", row)]), parse_map(columns))
    assert parse_pair("here", renamed) == parse_pair("here", explicit([QUESTION]))
    if "system" in row:
        ((_, renamed),) = rename_rows(iter([("here", row | {"system": SYSTEM["content"]})]), parse_map(columns))
        assert parse_pair("here", renamed) == parse_pair("here", explicit([SYSTEM, QUESTION]))
