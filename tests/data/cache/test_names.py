"""Whatever a command prints names the same response set or scoring again."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows

from adpa.data.cache.names import find_scoring, find_sets
from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName, ResponseSet, make_response_set
from adpa.data.cache.set_records import SetRecord
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import AdpaError


def made(name: ResponseName, seed: int) -> ResponseSet:
    info = replace(INFO, name=name, sampling=SAMPLING if name == "sampled" else None)
    return make_response_set(info, response_rows(seed, ["a", "b"]))


SETS = [made(name, seed) for seed, name in enumerate((*RESPONSE_NAMES, RESPONSE_NAMES[0]))]
SCORINGS = [SCORING, *(replace(SCORING, top_k=top_k) for top_k in range(10, 40))]
CHECKSUM = "0123456789abcdef" * 2

SET_FORMS = {
    "the id": "{id}",
    "name and id": "{name}-{id}",
    "the beginning of the id": "{short}",
    "the name and the beginning of the id": "{name}-{short}",
    "the beginning in its folder": "responses/{name}-{short}",
    "the file's name": "{name}-{id}-{checksum}.arrow",
    "the file's name without its ending": "{name}-{id}-{checksum}",
    "the file's place": "responses/{name}-{id}-{checksum}.arrow",
    "the place of a file that was set aside": "damaged/responses/{name}-{id}-{checksum}.arrow",
    "a path": "/data/chosen-caches/my cache/responses/{name}-{id}-{checksum}.arrow",
    "a URL": "s3://bucket/{other}/responses/{name}-{id}-{checksum}.arrow",
    "the line of an error": "{name}-{id}: 8 responses of the student 01234567, temperature 1, seed 0",
    "the title of a summary": "{name}-{id}, scoring 0123456789abcdef",
    "the row of a report": "{name} {id}",
    "the message on a file": "/cache/responses/{name}-{id}-{checksum}.arrow: damaged: not an Arrow table",
    "blanks around": "  {name}-{id}\n",
    "the id in a list": "{id},",
    "the id before an explanation": "{id}:",
    "the id in quotes": '"{id}"',
    "name and id in quotes": "`{name}-{id}`",
}


@pytest.mark.parametrize("form", SET_FORMS)
def test_every_form_names_the_one_set(form: str) -> None:
    for one, other in zip(SETS, SETS[1:] + SETS[:1], strict=True):
        parts = {"name": one.info.name, "id": one.id, "short": one.id[:4], "checksum": CHECKSUM}
        text = SET_FORMS[form].format(**parts, other=other.shard_prefix())
        assert [fitting.id for fitting in find_sets(text, SETS)] == [one.id], text


@pytest.mark.parametrize("text", ["chosen", " chosen ", "responses/chosen"])
def test_a_bare_name_names_all_its_sets(text: str) -> None:
    assert [one.id for one in find_sets(text, SETS)] == [SETS[0].id, SETS[3].id]
    assert [one.id for one in find_sets(text.replace("chosen", "sampled"), SETS)] == [SETS[2].id]


SCORING_FORMS = {
    "the id": "{id}",
    "the beginning of the id": "{short}",
    "the folder": "scorings/{id}",
    "the beginning in its folder": "scorings/{short}",
    "the folder as a shell completes it": "scorings/{id}/",
    "its description": "scorings/{id}/scoring.json",
    "its signals": "scorings/{id}/signals-{checksum}.arrow",
    "its pending rows": "scorings/{id}/pending/teacher-{checksum}.arrow",
    "a path": "/data/0123456789abcdef/scorings/{id}/scoring.json",
    "the row of a report": "scoring {id}",
    "the id in a list": "{id},",
    "the id in quotes": "'{id}'",
    "what the list of sets says": "chosen-0123456789abcdef scored: 20 of 20 by {id}",
    "the line of an error": "{id}: teacher org/teacher, reference org/reference, K = 10, float32, hf",
    "the end of a line": "chosen-0123456789abcdef: 8 responses with scoring {id}: teacher org/teacher",
    "the title of a summary": "chosen-0123456789abcdef, scoring {id}",
}


@pytest.mark.parametrize("form", SCORING_FORMS)
def test_every_form_names_the_one_scoring(form: str) -> None:
    for one in SCORINGS:
        text = SCORING_FORMS[form].format(id=one.id, short=one.id[:6], checksum=CHECKSUM)
        assert find_scoring(text, SCORINGS) == one, text


@pytest.mark.parametrize("form", ["{id}", "{name}-{id}", "{short}", "{name}-{short}", "responses/{name}-{id}-x.arrow"])
def test_ids_and_names_may_be_in_any_case(form: str) -> None:
    for one in SETS:
        text = form.format(name=one.info.name, id=one.id, short=one.id[:6])
        for written in (text.upper(), text.capitalize(), text.title()):
            assert [fitting.id for fitting in find_sets(written, SETS)] == [one.id], written
    assert [one.id for one in find_sets("CHOSEN", SETS)] == [SETS[0].id, SETS[3].id]
    for scoring in SCORINGS:
        for written in (scoring.id.upper(), scoring.id[:6].upper(), f"SCORINGS/{scoring.id.upper()}"):
            assert find_scoring(written, SCORINGS) == scoring


def refusal(function: object, text: str, present: object) -> str:
    with pytest.raises(AdpaError) as caught:
        function(text, present)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message.replace("\n  ", "")
    assert caught.value.exit_code == 2
    return message


def set_lines(sets: list[ResponseSet]) -> str:
    lines = [f"{one.describe().partition(': ')[2]}: --response-set {one.info.name}-{one.id}" for one in sets]
    return "\n  ".join(lines)


def scoring_lines(scorings: list[Scoring]) -> str:
    return "\n  ".join(f"{one.describe().partition(': ')[2]}: --scoring {one.id}" for one in scorings)


@pytest.mark.parametrize("text", ["f00d", "best", "chosen-f00d", "Choosen", f"rejected-{SETS[0].id}", SETS[0].id + "0"])
def test_a_set_that_is_not_there_is_refused_with_a_list_of_those_that_are(text: str) -> None:
    assert refusal(find_sets, text, SETS) == (
        f"--response-set {text}: the cache has none; name one of these:\n  {set_lines(SETS)}"
    )


def test_a_scoring_that_is_not_there_is_refused_with_a_list_of_those_that_are() -> None:
    assert refusal(find_scoring, "f00d", SCORINGS) == (
        f"--scoring f00d: the cache has none; name one of these:\n  {scoring_lines(SCORINGS)}"
    )


def test_a_list_tells_data_and_time_of_a_set_that_has_a_record() -> None:
    made_at = datetime(2026, 11, 28, 14, 2, 59, tzinfo=UTC).isoformat()
    one = replace(SETS[0], record=SetRecord("/data/prefs.jsonl", None, made_at))
    assert refusal(find_sets, "f00d", [one, SETS[1]]).splitlines()[1] == (
        f"  2 responses, from /data/prefs.jsonl (2026-11-28 14:02 UTC): --response-set chosen-{one.id}"
    )


def test_every_line_of_a_list_names_its_set_or_scoring() -> None:
    for one, line in zip(SETS, refusal(find_sets, "f00d", SETS).splitlines()[1:], strict=True):
        assert [fitting.id for fitting in find_sets(line, SETS)] == [one.id]
    for scoring, line in zip(SCORINGS, refusal(find_scoring, "f00d", SCORINGS).splitlines()[1:], strict=True):
        assert find_scoring(line, SCORINGS) == scoring


def test_what_is_not_there_at_all_is_told_in_one_line() -> None:
    assert refusal(find_sets, "chosen", []) == "--response-set chosen: the cache has none; found no response sets"
    assert refusal(find_sets, "f00d", SETS[:1]) == (
        f"--response-set f00d: the cache has none; found {SETS[0].describe()}"
    )
    assert refusal(find_scoring, "f00d", []) == "--scoring f00d: the cache has none; found no scorings"
    assert refusal(find_scoring, "f00d", SCORINGS[:1]) == (
        f"--scoring f00d: the cache has none; found {SCORING.describe()}"
    )


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_name_names_nothing(text: str) -> None:
    fix = "write one, or leave the option out"
    assert refusal(find_sets, text, SETS) == f"--response-set '': an empty value; {fix}"
    assert refusal(find_scoring, text, SCORINGS[:1]) == f"--scoring '': an empty value; {fix}"


def test_a_beginning_that_fits_several_lists_these() -> None:
    both = [SETS[0], SETS[3]]
    for text in ("chosen-", "chos", "responses/chosen-"):
        assert refusal(find_sets, text, SETS) == (
            f"--response-set {text}: 2 response sets fit; name one of them:\n  {set_lines(both)}"
        )
    letter = next(letter for letter in "0123456789abcdef" if sum(one.id[0] == letter for one in SCORINGS) > 1)
    fitting = [one for one in SCORINGS if one.id[0] == letter]
    assert refusal(find_scoring, letter, SCORINGS) == (
        f"--scoring {letter}: {len(fitting)} scorings fit; name one of them:\n  {scoring_lines(fitting)}"
    )


def test_a_models_name_is_no_scoring() -> None:
    odd = replace(SCORING, teacher=ModelIdentity(f"org/{SCORINGS[1].id}", None, "other"))
    assert find_scoring(odd.describe(), [odd, *SCORINGS]) == odd
