import pytest

from adpa.data.columns import lacks_responses, missing_columns, printable, suggest_map

ONE = "name it with --map"
TWO = "a row needs a prompt and two responses: name them with --map"
ALONE = "; prompts alone are enough where only --student answers them"
ALL = f"{TWO} prompt=NAME,chosen=NAME,rejected=NAME"


@pytest.mark.parametrize(
    ("names", "problem", "fix"),
    [
        (
            ["prompt", "chosen"],
            "found the columns prompt, chosen; expected `rejected`",
            f"{ONE} rejected=NAME",
        ),
        (
            ["prompt", "rejected", "score"],
            "found the columns prompt, rejected, score; expected `chosen`",
            f"{ONE} chosen=NAME",
        ),
        (
            ["question", "answer"],
            "found the columns question, answer; expected `chosen` and `rejected`",
            f"{TWO} prompt=question,chosen=NAME,rejected=NAME",
        ),
        (
            ["conversations"],
            "found the columns conversations; expected `chosen` and `rejected`",
            f"{TWO} chosen=NAME,rejected=NAME{ALONE}",
        ),
        (
            ["instruction", "output"],
            "found the columns instruction, output; expected `chosen` and `rejected`",
            f"{TWO} prompt=instruction,chosen=NAME,rejected=NAME{ALONE}",
        ),
        (["text"], "found the columns text; expected `chosen` and `rejected`", ALL),
        (
            ["prompt", "completion", "label"],
            "found the columns prompt, completion, label; expected",
            f"{TWO} chosen=NAME,rejected=NAME{ALONE}",
        ),
        ([], "found no columns; expected `chosen` and `rejected`", ALL),
        (
            ["question", "accepted", "rejected_response"],
            "found the columns question, accepted, rejected_response; expected `chosen` and `rejected`",
            "pass --map prompt=question,chosen=accepted,rejected=rejected_response",
        ),
        (
            ["Prompt", "Chosen", "Rejected"],
            "found the columns Prompt, Chosen, Rejected; expected `chosen` and `rejected`",
            "pass --map prompt=Prompt,chosen=Chosen,rejected=Rejected",
        ),
        (
            ["prompt", "chosen ", "rejected"],
            "found the columns prompt, 'chosen ', rejected; expected `chosen`",
            "rename 'chosen ': take the spaces away",
        ),
        (
            ["prompt", "choosen", "rejcted"],
            "found the columns prompt, choosen, rejcted; expected `chosen` and `rejected`",
            "pass --map chosen=choosen,rejected=rejcted",
        ),
        (
            ["query", "response-j", "response-k"],
            "found the columns query, response-j, response-k; expected `chosen` and `rejected`",
            "pass --map prompt=query,chosen=response-j,rejected=response-k",
        ),
        (
            ["The question", "accepted", "other"],
            "found the columns The question, accepted, other; expected `chosen` and `rejected`",
            "pass --map chosen=accepted,rejected=NAME",
        ),
        (
            ["prompt", "Chosen answer", "rejected"],
            "found the columns prompt, Chosen answer, rejected; expected `chosen`",
            "pass --map 'chosen=Chosen answer'",
        ),
    ],
)
def test_columns_without_a_response_are_told_with_the_map_to_copy(names: list[str], problem: str, fix: str) -> None:
    told = missing_columns(tuple(names))
    assert told is not None
    assert told[0].startswith(problem)
    assert told[1] == fix


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (("prompt",), True),
        (("instruction", "input", "output"), True),
        (("messages", "source"), True),
        (("prompt", "chosen"), False),
        (("prompt", "rejected"), False),
        (("prompt", "chosen "), False),
        (("prompt", "accepted", "refused"), False),
        (("prompt", "Chosen", "Rejected"), False),
        (("prompt", "rejected_response"), False),
    ],
)
def test_a_prompt_is_alone_only_where_nothing_looks_like_a_response(names: tuple[str, ...], lacks: bool) -> None:
    assert lacks_responses(names) == lacks


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


def test_a_prompt_of_another_name_is_mapped_only_where_there_is_none() -> None:
    assert suggest_map(("question", "chosen", "rejected")) == "pass --map prompt=question"
    assert suggest_map(("instruction", "input", "chosen", "rejected")) == "pass --map prompt=instruction"
    assert suggest_map(("prompt", "question", "chosen", "rejected")) == ""


def test_names_are_shown_on_one_short_line() -> None:
    assert printable([]) == "none"
    assert printable(["a", "b\n", " c", ""]) == "a, 'b\\n', ' c', ''"
    assert printable(["x" * 41, "y" * 40]) == f"{'x' * 40}…, {'y' * 40}"
    assert printable(map(str, range(15))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, and 3 more"
