"""Of several versions of one data set the newest is taken; whatever differs in more is listed, one a line."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.cache.test_selection import ADPA, DCKD, SFT, STUDENT, WITHOUT_REFERENCE, add_signals, lines_of, refusal
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows

from adpa.data.cache.choice import made_from
from adpa.data.cache.responses import ResponseName, ResponseSet, make_response_set, write_response_set
from adpa.data.cache.selection import Need, select, select_one_scored, select_scored
from adpa.data.cache.set_records import SetRecord, make_record
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import CacheError, ListedError

PREFS = make_record("/x/prefs.jsonl", None)
KD: dict[ResponseName, Need] = {"chosen": Need(signals=True, advantages=False)}
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"


def run(
    cache: Path, examples: str, *names: ResponseName, record: SetRecord | None = PREFS, seed: int = 0, **info: Any
) -> dict[ResponseName, ResponseSet]:
    """What a run of precompute writes before it scores."""
    record, sets = record and make_record(record.data, record.split), {}
    for number, name in enumerate(names):
        made = replace(INFO, name=name, sampling=SAMPLING if name == "sampled" else None)
        rows = [row for each in examples for row in response_rows(seed + ord(each) + 1000 * number, each)]
        sets[name] = make_response_set(replace(made, **info), rows, record)
        write_response_set(cache, sets[name])
    return sets


def ids(sets: Mapping[ResponseName, ResponseSet]) -> dict[ResponseName, str]:
    return {name: one.id for name, one in sets.items()}


def test_the_newest_version_of_grown_data_is_taken_and_counted(tmp_path: Path) -> None:
    versions = [run(tmp_path, examples, "chosen", "rejected") for examples in ("ab", "abc", "abcd")]
    for sets in versions:
        add_signals(tmp_path, SCORING, *sets.values())
    selection = select(tmp_path, DCKD, STUDENT)
    assert (ids(selection.sets), selection.newest_of) == (ids(versions[2]), 3)
    said = made_from(selection, selection.newest_of)
    assert said.startswith("newest of 3 sets made from /x/prefs.jsonl (20")


def test_a_single_set_tells_its_data_too(tmp_path: Path) -> None:
    run(tmp_path, "ab", "chosen", record=make_record("org/data", "train"))
    selection = select(tmp_path, SFT, STUDENT)
    assert selection.newest_of == 1
    assert made_from(selection, 1).startswith("org/data split train (20")
    run(tmp_path / "old", "ab", "chosen", record=None)
    assert made_from(select(tmp_path / "old", SFT, STUDENT), 1) == "not recorded"


@pytest.mark.parametrize("last", ["ab", "abX", "b"], ids=["shrunk back", "changed in place", "shrunk"])
def test_the_last_state_of_the_data_is_the_newest(last: str, tmp_path: Path) -> None:
    for examples in ("ab", "abc"):
        add_signals(tmp_path, SCORING, *run(tmp_path, examples, "chosen", "rejected").values())
    sets = run(tmp_path, last, "chosen", "rejected")
    add_signals(tmp_path, SCORING, *sets.values())
    selection = select(tmp_path, DCKD, STUDENT)
    assert (ids(selection.sets), selection.newest_of) == (ids(sets), 2 if last == "ab" else 3)


def test_sampled_responses_of_one_student_have_versions_too(tmp_path: Path) -> None:
    for examples in ("ab", "abc"):
        sets = run(tmp_path, examples, "chosen", "sampled")
        add_signals(tmp_path, SCORING, sets["sampled"])
    selection = select(tmp_path, ADPA, STUDENT)
    assert (ids(selection.sets), selection.newest_of) == (ids(sets), 2)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "another path": ({"record": make_record("/y/prefs.jsonl", None)}, "from /y/prefs.jsonl ("),
    "another split": ({"record": make_record("/x/prefs.jsonl", "test")}, "from /x/prefs.jsonl split test ("),
    "no record": ({"record": None}, "data not recorded"),
    "another length": ({"max_length": 64}, "max length 64"),
    "another prompt length": ({"max_prompt_length": 8}, "max prompt length 8"),
    "another template": ({"chat_template": "other-template"}, "chat template other-te"),
    "another tokenizer": ({"tokenizer": "other-tokenizer"}, "tokenizer other-to"),
    "another end of turn": ({"turn_end": 7}, "end of turn 7"),
    "template arguments": ({"chat_template_kwargs": {"think": True}}, 'template arguments {"think": true}'),
    "rendered prompts": ({"rendered": True}, "prompts rendered already"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_whatever_differs_in_more_than_its_rows_is_listed_the_newest_first(difference: str, tmp_path: Path) -> None:
    other, said = DIFFERENT[difference]
    older = run(tmp_path, "ab", "chosen", **other)["chosen"]
    newer = run(tmp_path, "abc", "chosen")["chosen"]
    first, *lines = lines_of(tmp_path, SFT)
    assert first == "2 combinations of responses and scoring fit; choose one by the options at the end of its line:"
    assert [line.rpartition(": ")[2] for line in lines] == [
        f"--response-set chosen-{newer.id}",
        f"--response-set chosen-{older.id}",
    ]
    assert lines[0].startswith("3 chosen responses, from /x/prefs.jsonl (")
    assert lines[1].startswith("2 chosen responses, ")
    assert said in lines[1]
    assert said not in lines[0]
    for one in (older, newer):
        chosen = select(tmp_path, SFT, STUDENT, response_sets=[f"chosen-{one.id}"])
        assert (chosen.sets["chosen"].id, chosen.newest_of) == (one.id, 1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(SCORING, teacher=ModelIdentity("org/second", None, "second")), "teacher org/second"),
        (replace(SCORING, dtype="float32"), "float32"),
        (WITHOUT_REFERENCE, "no reference"),
    ],
    ids=["two teachers", "another dtype", "no reference"],
)
def test_versions_with_two_scorings_are_listed(other: Scoring, said: str, tmp_path: Path) -> None:
    sets = [run(tmp_path, examples, "chosen")["chosen"] for examples in ("ab", "abc")]
    add_signals(tmp_path, SCORING, *sets)
    assert select(tmp_path, KD, STUDENT).newest_of == 2
    add_signals(tmp_path, other, sets[1])
    _, *lines = lines_of(tmp_path, KD)
    assert [f"--response-set chosen-{sets[1].id}" in line for line in lines] == [True, True, False, False]
    assert [f"--response-set chosen-{sets[0].id}" in line for line in lines] == [False, False, True, True]
    assert [said in line for line in lines] == [line.endswith(other.id) for line in lines]
    chosen = select(tmp_path, KD, STUDENT, scoring=SCORING.id)
    assert (chosen.sets["chosen"].id, chosen.newest_of) == (sets[1].id, 2)


def test_two_samplings_of_grown_data_are_listed(tmp_path: Path) -> None:
    for examples, temperature in (("ab", 0.7), ("abc", 0.7), ("abc", 1.0)):
        sets = run(tmp_path, examples, "chosen")
        sampling = replace(SAMPLING, temperature=temperature)
        info = replace(sets["chosen"].info, name="sampled", sampling=sampling)
        rows = [row for each in examples for row in response_rows(ord(each), each)]
        write_response_set(tmp_path, sampled := make_response_set(info, rows, sets["chosen"].record))
        add_signals(tmp_path, SCORING, sampled)
    _, *lines = lines_of(tmp_path, ADPA)
    assert [line.partition("temperature ")[2][:3] for line in lines] == ["1, ", "0.7", "0.7"]
    assert [line[:8] for line in lines] == ["3 chosen", "3 chosen", "2 chosen"]


def test_lines_are_copied_as_they_are(tmp_path: Path) -> None:
    """The options at the end of each line leave one combination: that line's."""
    for record in (PREFS, make_record("/y/prefs.jsonl", None), make_record("/z/prefs.jsonl", None)):
        sets = run(tmp_path, record.data[1:2] + "ab", "chosen", "rejected", record=record)
        add_signals(tmp_path, SCORING, *sets.values())
        add_signals(tmp_path, WITHOUT_REFERENCE, *sets.values())
    _, *lines = lines_of(tmp_path, DCKD)
    assert len(lines) == 6
    found = set()
    for line in lines:
        words = line.rpartition(": ")[2].split()
        options = list(zip(words[::2], words[1::2], strict=True))
        named = [value for option, value in options if option == "--response-set"]
        (scoring,) = [value for option, value in options if option == "--scoring"]
        selection = select(tmp_path, DCKD, STUDENT, scoring=scoring, response_sets=named)
        assert [one.shard_prefix() for one in selection.sets.values()] == named
        found.add((*named, scoring))
    assert len(found) == 6


def test_two_users_with_equal_names_of_files_are_kept_apart(tmp_path: Path) -> None:
    mine, theirs = (make_record(f"/home/{user}/prefs.jsonl", None) for user in ("ann", "bob"))
    run(tmp_path, "ab", "chosen", record=mine)
    run(tmp_path, "cd", "chosen", record=theirs)
    _, *lines = lines_of(tmp_path, SFT)
    assert ["/home/bob" in line for line in lines] == [True, False]
    run(tmp_path, "abc", "chosen", record=mine)  # still nobody gets the other's data unawares
    assert len(lines_of(tmp_path, SFT)) == 1 + 3


def test_a_newest_version_that_is_not_scored_whole_is_refused(tmp_path: Path) -> None:
    older = run(tmp_path, "ab", "chosen", "rejected")
    add_signals(tmp_path, SCORING, *older.values())
    newer = run(tmp_path, "abc", "chosen", "rejected")
    add_signals(tmp_path, SCORING, newer["chosen"])
    add_signals(tmp_path, SCORING, newer["rejected"], rows=2)
    message = refusal(tmp_path, DCKD)
    assert re.fullmatch(
        f"{tmp_path}: (chosen-{newer['chosen'].id}|rejected-{newer['rejected'].id}), from /x/prefs.jsonl \\({TIME}\\), "
        f"is newer than the responses that fit, but scoring {SCORING.id} has 2 of 3 rejected responses; "
        "finish it with the same adpa precompute, or take the older ones with "
        f"--response-set chosen-{older['chosen'].id} --response-set rejected-{older['rejected'].id} "
        f"--scoring {SCORING.id}",
        message,
    )
    for named in ([older["chosen"].id], [f"rejected-{older['rejected'].id}"]):
        assert ids(select(tmp_path, DCKD, STUDENT, response_sets=named).sets) == ids(older)
    add_signals(tmp_path, SCORING, newer["rejected"])
    assert ids(select(tmp_path, DCKD, STUDENT).sets) == ids(newer)


def test_a_newest_version_without_its_samples_is_refused(tmp_path: Path) -> None:
    older = run(tmp_path, "ab", "chosen", "sampled")
    add_signals(tmp_path, SCORING, older["sampled"])
    newer = run(tmp_path, "abc", "chosen")
    message = refusal(tmp_path, ADPA)
    assert f"chosen-{newer['chosen'].id}, from /x/prefs.jsonl" in message
    assert "but the cache has no sampled responses that go with it" in message
    assert ids(select(tmp_path, ADPA, STUDENT, response_sets=["chosen-" + older["chosen"].id]).sets) == ids(older)


@pytest.mark.parametrize(
    "other", [{"record": make_record("/y/prefs.jsonl", None)}, {"max_length": 64}, {"record": None}]
)
def test_unfinished_sets_of_another_recipe_hinder_nobody(other: dict[str, Any], tmp_path: Path) -> None:
    sets = run(tmp_path, "ab", "chosen", "rejected")
    add_signals(tmp_path, SCORING, *sets.values())
    run(tmp_path, "abc", "chosen", "rejected", **other)
    assert ids(select(tmp_path, DCKD, STUDENT).sets) == ids(sets)


def test_a_resumed_run_keeps_its_sets_though_there_are_newer_ones(tmp_path: Path) -> None:
    older = run(tmp_path, "ab", "chosen")
    earlier = select(tmp_path, SFT, STUDENT).ids
    newer = run(tmp_path, "abc", "chosen")
    kept = select(tmp_path, SFT, STUDENT, earlier=earlier)
    assert (ids(kept.sets), kept.newest_of) == (ids(older), 1)
    assert ids(select(tmp_path, SFT, STUDENT).sets) == ids(newer)
    assert ids(select(tmp_path, SFT, STUDENT, earlier={"scoring": None, "responses": {"chosen": "gone"}}).sets) == (
        ids(newer)
    )


def test_one_scored_set_is_the_newest_version_of_a_name(tmp_path: Path) -> None:
    versions = [run(tmp_path, examples, "chosen", "rejected") for examples in ("ab", "abc")]
    for sets in versions:
        add_signals(tmp_path, SCORING, *sets.values())
    for name in ("chosen", "rejected"):
        one, left_out = select_one_scored(tmp_path, response_set=name)
        assert (one.responses.id, one.newest_of, left_out) == (versions[1][name].id, 2, [])
    with pytest.raises(ListedError) as caught:
        select_one_scored(tmp_path)
    _, *lines = str(caught.value).splitlines()
    assert [line.partition(" responses")[0] for line in lines] == [
        "  3 chosen", "  3 rejected", "  2 chosen", "  2 rejected"
    ]  # fmt: skip
    scored, _ = select_scored(tmp_path)
    assert [len(one.responses) for one in scored] == [3, 3, 2, 2]


def test_a_list_crosses_processes_and_ranks_whole() -> None:
    error = ListedError("2 fit", "choose one", "first\nline", "second line")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "2 fit; choose one:\n  first line\n  second line"
    assert isinstance(copy, CacheError)


def test_one_reason_for_all_versions_is_said_once(tmp_path: Path) -> None:
    for examples in ("ab", "abc"):
        add_signals(tmp_path, WITHOUT_REFERENCE, *run(tmp_path, examples, "chosen").values())
    assert refusal(tmp_path, {"chosen": Need(signals=True, advantages=True)}) == (
        f"{tmp_path}: no scoring has the signals that are needed: scoring {WITHOUT_REFERENCE.id} has no reference, "
        "hence no advantages; run adpa precompute with these responses, and with --reference for advantages"
    )
