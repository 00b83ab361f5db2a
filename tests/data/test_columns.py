import pytest

from adpa.data.columns import lacks_responses, missing_columns, printable, renaming

NAME = "name the columns prompt, chosen and rejected"
TWO = "a row needs a prompt and two responses to it: prompt, chosen and rejected"
ALONE = f"{TWO}; prompts alone are enough where only --student answers them"


@pytest.mark.parametrize(
    ("names", "problem", "fix"),
    [
        (["prompt", "chosen"], "found the columns prompt, chosen; expected `rejected`", NAME),
        (["prompt", "rejected", "score"], "found the columns prompt, rejected, score; expected `chosen`", NAME),
        (["question", "answer"], "found the columns question, answer; expected `chosen` and `rejected`", TWO),
        (["conversations"], "found the columns conversations; expected `chosen` and `rejected`", ALONE),
        (["instruction", "output"], "found the columns instruction, output; expected `chosen` and `rejected`", ALONE),
        (["text"], "found the columns text; expected `chosen` and `rejected`", TWO),
        (["prompt", "completion", "label"], "found the columns prompt, completion, label; expected", ALONE),
        ([], "found no columns; expected `chosen` and `rejected`", TWO),
        (
            ["question", "accepted", "rejected_response"],
            "found the columns question, accepted, rejected_response; expected `chosen` and `rejected`",
            f"{NAME} (rename question to prompt, accepted to chosen, rejected_response to rejected)",
        ),
        (
            ["Prompt", "Chosen", "Rejected"],
            "found the columns Prompt, Chosen, Rejected; expected `chosen` and `rejected`",
            f"{NAME} (rename Prompt to prompt, Chosen to chosen, Rejected to rejected)",
        ),
        (
            ["prompt", "chosen ", "rejected"],
            "found the columns prompt, 'chosen ', rejected; expected `chosen`",
            f"{NAME} (rename 'chosen ' to chosen)",
        ),
        (
            ["prompt", "choosen", "rejcted"],
            "found the columns prompt, choosen, rejcted; expected `chosen` and `rejected`",
            f"{NAME} (rename choosen to chosen, rejcted to rejected)",
        ),
        (
            ["query", "response-j", "response-k"],
            "found the columns query, response-j, response-k; expected `chosen` and `rejected`",
            f"{NAME} (rename query to prompt, response-j to chosen, response-k to rejected)",
        ),
    ],
)
def test_columns_without_a_response_are_told_with_what_to_rename(names: list[str], problem: str, fix: str) -> None:
    told = missing_columns(tuple(names))
    assert told is not None
    assert told[0].startswith(problem)
    assert told[1] == fix


@pytest.mark.parametrize(
    "names",
    [
        ("chosen", "rejected"),
        ("prompt", "chosen", "rejected"),
        ("rejected", "chosen", "x"),
        ("instruction", "input", "output", "rejected"),
    ],
)
def test_two_responses_are_enough(names: tuple[str, ...]) -> None:
    assert missing_columns(names) is None


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (("prompt",), True),
        (("instruction", "input", "output"), True),
        (("messages", "source"), True),
        (("prompt", "chosen"), False),
        (("prompt", "rejected"), False),
        (("prompt", "accepted", "refused"), False),
        (("prompt", "Chosen", "Rejected"), False),
        (("prompt", "rejected_response"), False),
    ],
)
def test_a_prompt_is_alone_only_where_nothing_looks_like_a_response(names: tuple[str, ...], lacks: bool) -> None:
    assert lacks_responses(names) == lacks


def test_a_prompt_of_another_name_is_renamed_only_where_there_is_none() -> None:
    assert renaming(("question", "chosen", "rejected")) == "rename question to prompt"
    assert renaming(("instruction", "input", "chosen", "rejected")) == "rename instruction to prompt"
    assert renaming(("prompt", "question", "chosen", "rejected")) == ""


def test_names_are_shown_on_one_short_line() -> None:
    assert printable([]) == "none"
    assert printable(["a", "b\n", " c", ""]) == "a, 'b\\n', ' c', ''"
    assert printable(["x" * 41, "y" * 40]) == f"{'x' * 40}…, {'y' * 40}"
    assert printable(map(str, range(15))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, and 3 more"
