from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows, signal_rows

from adpa.data.cache.responses import RESPONSE_NAMES, ResponseName, ResponseSet, make_response_set, write_response_set
from adpa.data.cache.selection import Need, select, select_scored
from adpa.data.cache.signals import ModelIdentity, Scoring, write_scoring, write_signals
from adpa.errors import CacheError, ListedError

EXAMPLES = ["a", "b", "c", "d"]
STUDENT = SAMPLING.student
TOKENS_ONLY = Need(signals=False, advantages=False)
SIGNALS = Need(signals=True, advantages=False)
ADVANTAGES = Need(signals=True, advantages=True)

SFT: dict[ResponseName, Need] = {"chosen": TOKENS_ONLY}
DCKD: dict[ResponseName, Need] = {"chosen": SIGNALS, "rejected": SIGNALS}
ADPA: dict[ResponseName, Need] = {"chosen": TOKENS_ONLY, "sampled": ADVANTAGES}

WITHOUT_REFERENCE = replace(SCORING, reference=None)
OTHER_SCORING = replace(SCORING, teacher=ModelIdentity("org/other-teacher", None, "other-digest"))


def add_set(
    cache: Path, name: ResponseName, seed: int = 0, examples: list[str] | None = None, **info: Any
) -> ResponseSet:
    """Adds a response set with random content to a cache."""
    made = replace(INFO, name=name, sampling=SAMPLING if name == "sampled" else None)
    responses = make_response_set(replace(made, **info), response_rows(seed, examples or EXAMPLES))
    write_response_set(cache, responses)
    return responses


def add_signals(cache: Path, scoring: Scoring, *sets: ResponseSet, rows: int | None = None) -> None:
    """Adds the signals of a scoring for the first ``rows`` of some sets to a cache."""
    write_scoring(cache, scoring)
    for responses in sets:
        write_signals(cache, scoring, signal_rows(responses, 0, reference=scoring.reference is not None)[:rows])


def refusal(cache: Path, needs: Mapping[ResponseName, Need], student: str = STUDENT, **options: Any) -> str:
    with pytest.raises(CacheError) as caught:
        select(cache, needs, student, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lines_of(cache: Path, needs: Mapping[ResponseName, Need], student: str = STUDENT, **options: Any) -> list[str]:
    """The lines of an error with a list: first what is wrong, then what can be chosen."""
    with pytest.raises(ListedError) as caught:
        select(cache, needs, student, **options)
    first, *lines = str(caught.value).splitlines()
    assert all(line.startswith("  ") for line in lines)
    return [first, *(line[2:] for line in lines)]


def test_the_one_combination_that_fits_is_found(tmp_path: Path) -> None:
    chosen, rejected, sampled = (add_set(tmp_path, name, seed) for seed, name in enumerate(RESPONSE_NAMES))
    add_signals(tmp_path, SCORING, chosen, rejected, sampled)

    dckd = select(tmp_path, DCKD, STUDENT)
    assert {name: one.id for name, one in dckd.sets.items()} == {"chosen": chosen.id, "rejected": rejected.id}
    assert dckd.scoring == SCORING

    adpa = select(tmp_path, ADPA, STUDENT)
    assert {name: one.id for name, one in adpa.sets.items()} == {"chosen": chosen.id, "sampled": sampled.id}
    assert adpa.signals is not None
    assert (adpa.signals.locate(sampled.table["key"]) >= 0).all()


def test_parts_come_in_the_order_of_the_needs_with_signals_where_they_are_needed(tmp_path: Path) -> None:
    chosen, sampled = add_set(tmp_path, "chosen"), add_set(tmp_path, "sampled", 1)
    add_signals(tmp_path, SCORING, sampled)
    first, second = select(tmp_path, ADPA, STUDENT).training_sets(ADPA)
    assert (first.responses.id, first.signals) == (chosen.id, None)
    assert second.responses.id == sampled.id
    assert second.signals is not None


def test_a_run_on_tokens_alone_needs_no_scoring(tmp_path: Path) -> None:
    chosen = add_set(tmp_path, "chosen")
    add_signals(tmp_path, SCORING, chosen)
    selection = select(tmp_path, SFT, STUDENT)
    assert (selection.sets["chosen"].id, selection.scoring, selection.signals) == (chosen.id, None, None)


def test_of_two_scorings_the_one_that_has_everything_is_found(tmp_path: Path) -> None:
    chosen, sampled = add_set(tmp_path, "chosen"), add_set(tmp_path, "sampled", 1)
    add_signals(tmp_path, WITHOUT_REFERENCE, chosen, sampled)
    add_signals(tmp_path, OTHER_SCORING, sampled, rows=2)
    add_signals(tmp_path, SCORING, sampled)
    assert select(tmp_path, ADPA, STUDENT).scoring == SCORING


def test_the_responses_that_this_student_sampled_are_found(tmp_path: Path) -> None:
    add_set(tmp_path, "chosen")
    sampled = {
        student: add_set(tmp_path, "sampled", seed, sampling=replace(SAMPLING, student=student))
        for seed, student in enumerate(("first", "second"))
    }
    add_signals(tmp_path, SCORING, *sampled.values())
    for student, responses in sampled.items():
        assert select(tmp_path, ADPA, student).sets["sampled"].id == responses.id


def test_a_cache_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / "cache", SFT).startswith(
        f"{tmp_path / 'cache'}: no cache there; make it with adpa precompute"
    )


def test_a_set_that_is_missing_is_named_with_the_way_to_make_it(tmp_path: Path) -> None:
    add_signals(tmp_path, SCORING, add_set(tmp_path, "chosen"))
    assert refusal(tmp_path, DCKD) == (
        f"{tmp_path}: the cache has no rejected responses; run adpa precompute --responses rejected"
    )
    assert "has no sampled responses of this student (student-); run adpa precompute with --student" in refusal(
        tmp_path, ADPA
    )


def test_responses_of_another_student_are_refused_and_listed(tmp_path: Path) -> None:
    sampled = add_set(tmp_path, "sampled")
    add_signals(tmp_path, SCORING, add_set(tmp_path, "chosen"), sampled)
    message = refusal(tmp_path, ADPA, "newcomer-digest")
    assert (
        f"no sampled responses of this student (newcomer); found {sampled.describe()}; run adpa precompute" in message
    )


def test_a_cache_without_scorings_is_refused(tmp_path: Path) -> None:
    add_set(tmp_path, "chosen")
    assert refusal(tmp_path, {"chosen": SIGNALS}) == f"{tmp_path}: found no scorings; make one with adpa precompute"


def test_advantages_without_a_reference_are_refused(tmp_path: Path) -> None:
    add_signals(tmp_path, WITHOUT_REFERENCE, add_set(tmp_path, "chosen"))
    message = refusal(tmp_path, {"chosen": ADVANTAGES})
    assert f"scoring {WITHOUT_REFERENCE.id} has no reference, hence no advantages" in message
    assert "--reference" in message
    assert select(tmp_path, {"chosen": SIGNALS}, STUDENT).scoring == WITHOUT_REFERENCE


def test_a_scoring_that_lacks_rows_is_refused_with_their_number(tmp_path: Path) -> None:
    chosen, rejected = add_set(tmp_path, "chosen"), add_set(tmp_path, "rejected", 1)
    add_signals(tmp_path, SCORING, chosen)
    add_signals(tmp_path, SCORING, rejected, rows=3)
    add_signals(tmp_path, OTHER_SCORING, chosen, rows=1)
    first, *lines = lines_of(tmp_path, DCKD)
    assert "no scoring has the signals that are needed; run adpa precompute" in first
    sets = f"{chosen.shard_prefix()}, {rejected.shard_prefix()}"
    assert sorted(lines) == sorted(
        [
            f"{sets}: scoring {SCORING.id} has 3 of 4 rejected responses",
            f"{sets}: scoring {OTHER_SCORING.id} has 1 of 4 chosen responses",
        ]
    )


def test_a_scoring_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    foreign = replace(SCORING, vocabulary="other")
    add_signals(tmp_path, foreign, add_set(tmp_path, "chosen"))
    assert f"scoring {foreign.id} has another vocabulary" in refusal(tmp_path, {"chosen": SIGNALS})


def test_of_two_data_sets_one_is_chosen_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    sets = [
        (add_set(tmp_path, "chosen", seed, examples), add_set(tmp_path, "rejected", seed + 10, examples))
        for seed, examples in enumerate((["a", "b"], ["c", "d"]))
    ]
    add_signals(tmp_path, SCORING, *sets[0], *sets[1])
    first, *lines = lines_of(tmp_path, DCKD)
    assert first == ("2 combinations of responses and scoring fit; choose one by the options at the end of its line:")
    assert sorted(lines) == sorted(
        "2 chosen and 2 rejected responses, data not recorded: "
        f"--response-set chosen-{chosen.id} --response-set rejected-{rejected.id} --scoring {SCORING.id}"
        for chosen, rejected in sets
    )

    for chosen, rejected in sets:
        for options in ([chosen.id], [rejected.id[:8]], [chosen.id[:8], rejected.id]):
            selection = select(tmp_path, DCKD, STUDENT, response_sets=options)
            assert (selection.sets["chosen"].id, selection.sets["rejected"].id) == (chosen.id, rejected.id)


def test_of_two_scorings_that_fit_one_is_chosen_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    chosen = add_set(tmp_path, "chosen")
    needs: dict[ResponseName, Need] = {"chosen": SIGNALS}
    for scoring in (SCORING, OTHER_SCORING):
        add_signals(tmp_path, scoring, chosen)
    _, *lines = lines_of(tmp_path, needs)
    assert sorted(lines) == sorted(
        f"4 chosen responses, data not recorded, {scoring.settings}: "
        f"--response-set chosen-{chosen.id} --scoring {scoring.id}"
        for scoring in (SCORING, OTHER_SCORING)
    )
    for scoring in (SCORING, OTHER_SCORING):
        assert select(tmp_path, needs, STUDENT, scoring=scoring.id[:8]).scoring == scoring
    first, *lines = lines_of(tmp_path, needs, scoring="f00d")
    assert first == "--scoring f00d: the cache has none; name one of these:"
    assert sorted(lines) == sorted(f"{one.settings}: --scoring {one.id}" for one in (SCORING, OTHER_SCORING))


def test_two_samplings_of_one_student_are_listed_with_their_settings(tmp_path: Path) -> None:
    add_set(tmp_path, "chosen")
    sampled = [
        add_set(tmp_path, "sampled", seed, sampling=replace(SAMPLING, seed=seed, temperature=temperature))
        for seed, temperature in ((1, 0.5), (2, 1.0))
    ]
    add_signals(tmp_path, SCORING, *sampled)
    _, *lines = lines_of(tmp_path, ADPA)
    for one, settings in zip(sampled, ("temperature 0.5, seed 1", "temperature 1, seed 2"), strict=True):
        assert sum(settings in line and one.id in line for line in lines) == 1
    assert select(tmp_path, ADPA, STUDENT, response_sets=[sampled[1].id]).sets["sampled"].id == sampled[1].id


def test_a_response_set_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    chosen = add_set(tmp_path, "chosen")
    message = refusal(tmp_path, SFT, response_sets=["f00d"])
    assert message == f"--response-set f00d: the cache has none; found {chosen.describe()}"


def test_two_response_sets_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    sets = [add_set(tmp_path, "chosen", seed, examples) for seed, examples in enumerate((["a"], ["b"]))]
    message = refusal(tmp_path, SFT, response_sets=[responses.id for responses in sets])
    assert message == (
        f"--response-set {sets[1].id}: another chosen set was named before it: {sets[0].describe()}; "
        "name one chosen set"
    )


@pytest.mark.parametrize(
    "difference",
    [
        {"max_length": 64},
        {"max_prompt_length": 8},
        {"tokenizer": "other"},
        {"chat_template": "other"},
        {"turn_end": 3},
        {"rendered": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"examples": ["a", "b", "c"]},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_sets_that_were_made_differently_do_not_go_together(difference: dict[str, Any], tmp_path: Path) -> None:
    chosen, rejected = add_set(tmp_path, "chosen"), add_set(tmp_path, "rejected", 1, **difference)
    add_signals(tmp_path, SCORING, chosen, rejected)
    first, *lines = lines_of(tmp_path, DCKD)
    assert "no chosen and rejected responses made from the same data with the same tokenizer and limits" in first
    assert lines == [chosen.describe(), rejected.describe()]
    assert select(tmp_path, {"rejected": SIGNALS}, STUDENT).sets["rejected"].id == rejected.id


def test_every_set_is_found_with_every_scoring_that_has_it_whole(tmp_path: Path) -> None:
    chosen, rejected, sampled = (add_set(tmp_path, name, seed) for seed, name in enumerate(RESPONSE_NAMES))
    add_signals(tmp_path, SCORING, chosen, rejected)
    add_signals(tmp_path, WITHOUT_REFERENCE, chosen)
    add_signals(tmp_path, WITHOUT_REFERENCE, sampled, rows=3)
    actual, left_out = select_scored(tmp_path)
    assert {(one.responses.id, one.scoring.id) for one in actual} == {
        (chosen.id, SCORING.id),
        (chosen.id, WITHOUT_REFERENCE.id),
        (rejected.id, SCORING.id),
    }
    (line,) = left_out
    assert line.startswith(sampled.describe())
    assert f"scoring {SCORING.id} has 0 of 4 sampled responses" in line
    assert f"scoring {WITHOUT_REFERENCE.id} has 3 of 4 sampled responses" in line


def test_beginnings_of_ids_leave_fewer_of_them(tmp_path: Path) -> None:
    chosen, rejected = add_set(tmp_path, "chosen", 1), add_set(tmp_path, "rejected", 2)
    add_signals(tmp_path, SCORING, chosen, rejected)
    add_signals(tmp_path, WITHOUT_REFERENCE, chosen, rejected)
    for beginning in ("rejected", f"rejected-{rejected.id[:4]}", rejected.id[:5]):
        (one,), _ = select_scored(tmp_path, SCORING.id[:6], beginning)
        assert (one.responses.id, one.scoring) == (rejected.id, SCORING)


def test_a_set_that_no_scoring_has_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        select_scored(tmp_path)
    chosen = add_set(tmp_path, "chosen")
    with pytest.raises(CacheError, match="found no scorings"):
        select_scored(tmp_path)
    add_signals(tmp_path, SCORING, chosen, rows=1)
    with pytest.raises(CacheError, match=f"scoring {SCORING.id} has 1 of 4 chosen responses; finish scoring"):
        select_scored(tmp_path)
    with pytest.raises(CacheError, match=f"--response-set sampled: the cache has none; found chosen-{chosen.id}"):
        select_scored(tmp_path, response_set="sampled")


def test_a_set_is_chosen_by_every_name_of_it(tmp_path: Path) -> None:
    sets = [add_set(tmp_path, "chosen", seed, examples) for seed, examples in enumerate((["a"], ["b"]))]
    for one in sets:
        (path,) = (tmp_path / "responses").glob(f"{one.shard_prefix()}-*")
        for text in (one.shard_prefix(), one.shard_prefix()[:11], path.name, str(path), one.describe()):
            for texts in ([text], ["chosen", text], [text, "chosen"], [text, one.id]):
                assert select(tmp_path, SFT, STUDENT, response_sets=texts).sets["chosen"].id == one.id
    assert "2 combinations of responses and scoring fit" in lines_of(tmp_path, SFT, response_sets=["chosen"])[0]


def test_a_named_set_that_the_run_does_not_read_is_refused(tmp_path: Path) -> None:
    chosen, rejected = add_set(tmp_path, "chosen"), add_set(tmp_path, "rejected", 1)
    for text in ("rejected", rejected.id, rejected.shard_prefix()):
        assert refusal(tmp_path, SFT, response_sets=[text]) == (
            f"--response-set {text}: {rejected.describe()}; this run reads chosen responses; "
            "leave it out, or choose another objective or --on"
        )
    assert "sampled: the cache has none; name one" in lines_of(tmp_path, SFT, response_sets=["sampled"])[0]
    assert select(tmp_path, SFT, STUDENT, response_sets=["chosen"]).sets["chosen"].id == chosen.id


def test_sets_that_differ_in_template_arguments_alone_are_told_apart(tmp_path: Path) -> None:
    arguments: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    sets = [add_set(tmp_path, "chosen", chat_template_kwargs=one) for one in arguments]
    _, *lines = lines_of(tmp_path, SFT)
    shown = (
        "the usual rendering",
        *(f'template arguments {{"enable_thinking": {flag}}}' for flag in ("false", "true")),
    )
    assert sorted(lines) == sorted(
        f"4 chosen responses, data not recorded, {how}: --response-set chosen-{one.id}"
        for one, how in zip(sets, shown, strict=True)
    )
