"""Stage one as its users see it: what is scored, what is reused, what is refused."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.conftest import MakeModel, Models, Row, WriteRows, swap_two_tokens
from tests.pipeline.conftest import Filled, InstallVllm
from transformers import AutoTokenizer

from adpa import precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.rounding import LOGPROBS
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import AdpaError, CacheError, DamagedFileError, DataError, ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint


def files(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def test_a_second_run_scores_nothing_and_writes_nothing(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"teacher": str(models.teacher), "data": str(write_rows(preference_rows[:5]))}
    cache = tmp_path / "cache"
    first = precompute(**options, cache=cache, top_k=7)
    written = files(cache)
    second = precompute(**options, cache=cache, top_k=7)
    assert (first.scored, first.reused) == (10, 0)
    assert (second.scored, second.reused, second.tokens) == (0, 10, 0)
    assert second.responses == first.responses
    assert files(cache) == written


def test_ten_new_pairs_cost_exactly_their_twenty_responses(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    cache, teacher = tmp_path / "cache", str(models.teacher)
    precompute(teacher, str(write_rows(preference_rows[:10], "ten.jsonl")), cache)
    grown = precompute(teacher, str(write_rows(preference_rows, "twenty.jsonl")), cache)
    assert (grown.scored, grown.reused) == (20, 20)


def test_a_second_student_costs_only_its_own_samples(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled.cache, cache)
    common: dict[str, Any] = {"teacher": str(filled.models.teacher), "reference": str(filled.models.reference)}
    report = precompute(
        **common,
        data=str(filled.data),
        cache=cache,
        top_k=10,
        student=str(filled.models.other_student),
        responses="chosen,rejected,sampled",
        max_new_tokens=6,
    )
    assert (report.sampled, report.scored, report.reused) == (8, 8, 16)


def test_the_cache_does_not_depend_on_the_order_of_the_data_or_on_the_batch(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    shuffled = preference_rows[:6]
    random.Random(0).shuffle(shuffled)
    runs = [(preference_rows[:6], 8192), (shuffled, 100)]
    caches = []
    for number, (rows, batch_tokens) in enumerate(runs):
        cache = tmp_path / f"cache-{number}"
        precompute(
            teacher=str(models.teacher),
            reference=str(models.reference),
            student=str(models.student),
            data=str(write_rows(rows, f"{number}.jsonl")),
            cache=cache,
            responses="chosen,rejected,sampled",
            max_new_tokens=6,
            batch_tokens=batch_tokens,
        )
        caches.append(cache)
    one, two = caches
    sets = [{each.id: each for each in read_response_sets(cache)} for cache in caches]
    assert sets[0].keys() == sets[1].keys()
    assert [each.info for each in sets[0].values()] == [each.info for each in sets[1].values()]
    assert all(sets[1][each.id].table.equals(each.table) for each in sets[0].values())
    (scoring,) = read_scorings(one)
    assert [scoring] == list(read_scorings(two))
    signals_one, signals_two = read_signals(one, scoring), read_signals(two, scoring)
    assert signals_one.keys() == signals_two.keys()
    keys = pa.array(sorted(signals_one.keys()), pa.binary(16))
    for first, second in zip(signals_one.locate(keys), signals_two.locate(keys), strict=True):
        row, other = signals_one.row(int(first)), signals_two.row(int(second))
        np.testing.assert_array_equal(row.topk_ids, other.topk_ids)
        np.testing.assert_allclose(row.token_logprobs, other.token_logprobs, atol=1e-5)


def test_scoring_and_sampling_have_batches_of_their_own_size_unless_the_user_says_one(
    few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch becomes a file: one sequence in each, or all in one."""
    monkeypatch.setattr("adpa.pipeline.scoring.engine.HfEngine.scoring_tokens", lambda *_: 1)
    monkeypatch.setattr("adpa.pipeline.scoring.engine.HfEngine.sampling_tokens", lambda *_: 10**6)
    for said, expected in ((None, (8, 1)), (10**6, (1, 1)), (1, (8, 8))):
        cache = tmp_path / str(said)
        report = precompute(
            teacher=str(few_words.models.teacher),
            student=str(few_words.models.student),
            data=str(few_words.data),
            cache=cache,
            max_new_tokens=6,
            batch_tokens=said,
        )
        assert (report.scored, report.sampled) == (8, 8)
        assert tuple(len(list(cache.rglob(f"{kind}-*.arrow"))) for kind in ("signals", "samples")) == expected


def test_sampled_responses_are_stored_with_the_chosen_ones_beside_them(filled: Filled) -> None:
    sets = {found.info.name: found for found in read_response_sets(filled.cache)}
    assert sets.keys() == {"chosen", "rejected", "sampled"}
    assert len(sets["sampled"]) == 2 * len(sets["chosen"]) == 16
    assert sets["sampled"].info.examples == sets["chosen"].info.examples
    sampling = sets["sampled"].info.sampling
    assert sampling is not None
    assert (sampling.max_new_tokens, sampling.samples_per_prompt, sampling.temperature) == (6, 2, 1.0)


def test_the_responses_are_the_texts_of_the_data(filled: Filled) -> None:
    tokenizer = AutoTokenizer.from_pretrained(filled.models.teacher)
    chosen = next(found for found in read_response_sets(filled.cache) if found.info.name == "chosen")
    said = {tokenizer.decode(sequence.response_ids) for sequence in chosen.sequences()}
    rows = [json.loads(line) for line in filled.data.read_text().splitlines()]
    assert said == {row["chosen"][0]["content"] + "<|im_end|>" for row in rows}


def test_what_is_cut_is_counted(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    report = precompute(
        str(models.teacher), str(write_rows(preference_rows[:5])), tmp_path, max_prompt_length=20, max_length=24
    )
    assert report.truncated_prompts == 5
    assert report.truncated_responses > 0
    assert report.tokens <= 10 * 4


def test_pairs_that_cannot_be_used_are_dropped_and_counted_when_asked(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [*preference_rows[:3], {**preference_rows[3], "chosen": ""}]
    data = str(write_rows(rows))
    with pytest.raises(DataError, match=r"line 4: `chosen` is an empty response"):
        precompute(str(models.teacher), data, tmp_path / "cache")
    report = precompute(str(models.teacher), data, tmp_path / "cache", drop_invalid=True)
    assert (report.dropped, report.scored) == (1, 6)
    assert (report.rows, report.used, report.dropped_by_reason) == (4, 3, {"empty response": 1})
    with pytest.raises(DataError, match="found no row that can be used: dropped 1 "):
        precompute(str(models.teacher), str(write_rows(rows[3:], "bad.jsonl")), tmp_path / "cache", drop_invalid=True)


def test_repeated_identical_and_exchanged_pairs_are_counted_and_stay_in_use(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    first, second = preference_rows[:2]
    exchanged = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    identical = {**second, "rejected": second["chosen"]}
    data = str(write_rows([first, second, first, exchanged, identical, {**first, "rejected": None}]))
    report = precompute(str(models.teacher), data, tmp_path, drop_invalid=True, dry_run=True)
    assert (report.rows, report.used, report.dropped_by_reason) == (6, 5, {"null response": 1})
    assert (report.duplicates, report.identical, report.contradicting) == (1, 1, 1)
    assert report.scored == 4


def test_a_dry_run_predicts_what_a_run_does_and_loads_no_model(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data), "cache": tmp_path / "c"}
    with monkeypatch.context() as patch:
        patch.setattr("adpa.pipeline.models.checkpoint.Checkpoint.load", lambda *_: pytest.fail("a model was loaded"))
        predicted = precompute(**options, dry_run=True)
        assert not (tmp_path / "c").exists()
    done = precompute(**options)
    assert replace(predicted, seconds=0, dry_run=False, bytes=done.bytes) == replace(done, seconds=0)
    assert 0 < done.bytes < predicted.bytes
    size = sum(path.stat().st_size for path in (tmp_path / "c" / "scorings").rglob("*.arrow"))
    assert done.bytes == size


def test_a_nucleus_and_rounding_reach_the_scoring_and_its_rows(filled: Filled, tmp_path: Path) -> None:
    common: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data), "top_k": 50}
    common |= {"reference": str(filled.models.reference), "cache": tmp_path}
    precompute(**common)
    precompute(**common, top_p=0.1, lossy=True)
    scorings = {(scoring.top_p, scoring.lossy): scoring for scoring in read_scorings(tmp_path)}
    assert scorings.keys() == {(1.0, False), (0.1, True)}
    exact, small = (read_signals(tmp_path, scorings[kind]) for kind in ((1.0, False), (0.1, True)))
    keys = pa.array(sorted(exact.keys()), pa.binary(16))
    ragged = 0
    for here, there in zip(exact.locate(keys), small.locate(keys), strict=True):
        row, rounded = exact.row(int(here)), small.row(int(there))
        kept = rounded.topk_ids != -1
        ragged += int((~kept).sum())
        np.testing.assert_array_equal(rounded.topk_ids[kept], row.topk_ids[kept])
        assert np.isin(rounded.topk_logprobs[kept], LOGPROBS).all()
    assert ragged > 0


def test_a_dry_run_with_a_student_counts_at_most(filled: Filled, tmp_path: Path) -> None:
    report = precompute(
        str(filled.models.teacher),
        str(filled.data),
        tmp_path,
        student=str(filled.models.student),
        samples_per_prompt=3,
        max_new_tokens=11,
        dry_run=True,
    )
    assert (report.sampled, report.scored, report.tokens) == (24, 24, 24 * 11)


def test_a_flipped_byte_and_a_truncated_shard_are_refused_by_name(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data), "cache": cache}
    precompute(**options)
    (shard,) = cache.glob("scorings/*/signals-*.arrow")
    whole = shard.read_bytes()
    for damaged in (whole[:-100], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=f"{shard.name}: damaged") as caught:
            precompute(**options)
        assert caught.value.exit_code == 1
    shard.unlink()
    assert precompute(**options).scored == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 50000}, r"--top-k 50000: .* has 8192 tokens"),
        ({"top_k": 0}, r"--top-k 0; expected at least 1"),
        ({"temperature": -1.0}, r"--temperature -1; expected 0 or more"),
        ({"top_p": 0.0}, r"--top-p 0; expected more than 0"),
        ({"sampling_top_p": 1.5}, r"--sampling-top-p 1.5; expected more than 0 and at most 1"),
        ({"max_new_tokens": 0}, r"--max-new-tokens 0; expected at least 1"),
        ({"tensor_parallel": 2, "device": "cpu"}, r"--tensor-parallel is for vLLM; the engine is hf"),
        ({"engine_arg": ["seed"]}, r"--engine-arg seed; expected key=value"),
        ({"batch_tokens": 0}, r"--batch-tokens 0; expected at least 1"),
        ({"responses": "chosen,loved"}, r"found 'loved'; expected chosen, rejected, sampled"),
        ({"responses": "sampled"}, r"--responses sampled without --student"),
        ({"max_prompt_length": 64, "max_length": 64}, r"0 < max-prompt-length < max-length"),
        ({"max_prompt_length": 1024, "max_length": 4096, "student": "student", "max_new_tokens": 2048}, "positions"),
        ({"teacher": "./nowhere"}, r"\./nowhere: no such directory"),
        ({"data": "./nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        ({"device": "cuda:9"}, r"--device cuda:9"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, filled: Filled, tmp_path: Path
) -> None:
    if "student" in options:
        options = options | {"student": str(filled.models.student)}
    common: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data)}
    with pytest.raises(AdpaError, match=message):
        precompute(**(common | options), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("model", ["teacher", "reference", "student"])
def test_a_model_that_does_not_fit_is_refused_before_the_data_is_read(
    model: str, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: dict[str, Any] = {name: str(getattr(filled.models, name)) for name in ("teacher", "reference", "student")}
    size = Checkpoint.weight_bytes
    monkeypatch.setattr(
        Checkpoint, "weight_bytes", lambda self, dtype: 10**15 if self.name == models[model] else size(self, dtype)
    )
    data = tmp_path / "prefs.jsonl"
    data.write_text(filled.data.read_text().splitlines()[0] + "\nbroken\n")
    with pytest.raises(ModelError, match=rf"{models[model]}: its weights take about 1000000\.0 GB in float32"):
        precompute(**models, data=str(data), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_vllm_that_is_not_installed_is_refused(filled: Filled, tmp_path: Path, install_vllm: InstallVllm) -> None:
    install_vllm(None)
    with pytest.raises(OptionError, match="vLLM is not installed"):
        precompute(str(filled.models.teacher), str(filled.data), tmp_path, engine="vllm")


def test_the_report_says_which_engine_it_was_and_why(filled: Filled, tmp_path: Path, install_vllm: InstallVllm) -> None:
    install_vllm("0.33.0+cpu")
    options: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data), "cache": tmp_path}
    options |= {"device": "cpu", "dry_run": True}
    hf = precompute(**options)
    assert (hf.engine, hf.engine_reason) == ("hf", "there is no GPU")
    vllm = precompute(**options, engine="vllm", quantization="fp8")
    assert vllm.engine == 'vllm hidden-states teacher:quantization="fp8"'
    assert vllm.engine_reason == "as asked; hidden states and adpa's head"
    assert vllm.scoring != hf.scoring, "one engine's signals are not another's"


def test_sequences_longer_than_max_model_len_are_counted_and_refused(
    filled: Filled, tmp_path: Path, install_vllm: InstallVllm
) -> None:
    install_vllm("0.33.0+cpu")
    options: dict[str, Any] = {"teacher": str(filled.models.teacher), "data": str(filled.data), "cache": tmp_path}
    options |= {"engine": "vllm", "device": "cpu", "dry_run": True}
    sequences = [
        s for found in read_response_sets(filled.cache) if found.info.sampling is None for s in found.sequences()
    ]
    longest = max(map(len, sequences))
    count = sum(len(sequence) == longest for sequence in sequences)
    precompute(**options, max_model_len=longest)
    message = rf"--max-model-len: {count} of 16 sequences have more than {longest - 1} tokens, up to {longest}"
    with pytest.raises(OptionError, match=message):
        precompute(**options, max_model_len=longest - 1)


@pytest.mark.parametrize("model", ["reference", "student"])
def test_a_model_of_another_vocabulary_is_refused_by_the_token(
    model: str, make_model: MakeModel, filled: Filled, tmp_path: Path
) -> None:
    other = make_model(30)
    swap_two_tokens(other)
    with pytest.raises(ModelError, match=r"different vocabularies: the token '.*' has the id 100[01]"):
        precompute(str(filled.models.teacher), str(filled.data), tmp_path, **{model: str(other)})  # type: ignore[arg-type]


def test_a_teacher_without_a_chat_template_is_refused(make_model: MakeModel, filled: Filled, tmp_path: Path) -> None:
    teacher = make_model(31)
    (teacher / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        precompute(str(teacher), str(filled.data), tmp_path)


def test_the_teacher_as_its_own_reference_is_refused(filled: Filled, tmp_path: Path) -> None:
    teacher = str(filled.models.teacher)
    with pytest.raises(OptionError, match="every advantage would be 0"):
        precompute(teacher, str(filled.data), tmp_path, reference=teacher)


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_any_day(
    make_model: MakeModel, filled: Filled, tmp_path: Path
) -> None:
    teacher = make_model(42)
    template = teacher / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + template.read_text())
    first = precompute(str(teacher), str(filled.data), tmp_path)
    second = precompute(str(teacher), str(filled.data), tmp_path)
    assert (first.scored, second.scored) == (16, 0)


def test_a_student_is_refused_where_no_response_is_sampled(filled: Filled, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--responses chosen with --student"):
        precompute(
            str(filled.models.teacher),
            str(filled.data),
            tmp_path,
            student=str(filled.models.student),
            responses="chosen",
        )


def test_the_position_of_the_token_that_vllms_own_head_adds_is_counted(
    make_model: MakeModel, filled: Filled, tmp_path: Path, install_vllm: InstallVllm
) -> None:
    install_vllm("0.33.0+cpu")
    sequences = [
        s for found in read_response_sets(filled.cache) if found.info.sampling is None for s in found.sequences()
    ]
    longest = max(map(len, sequences))
    teacher = make_model(90, max_position_embeddings=longest)
    options: dict[str, Any] = {"teacher": str(teacher), "data": str(filled.data), "cache": tmp_path}
    options |= {"engine": "vllm", "device": "cpu", "dry_run": True}
    precompute(**options)
    with pytest.raises(ModelError, match=rf"need more positions, up to {longest + 1}, than the model has, {longest}"):
        precompute(**options, head_dtype="model")


def test_a_set_is_never_made_of_a_part_of_its_samples(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove samples between sampling and reading."""
    monkeypatch.setattr("adpa.pipeline.scoring.sample.sample_responses", lambda *_: None)
    with pytest.raises(CacheError, match="8 samples that this run made are gone"):
        precompute(
            teacher=str(filled.models.teacher),
            student=str(filled.models.student),
            data=str(filled.data),
            cache=tmp_path / "cache",
        )
    assert not list((tmp_path / "cache").glob("responses/sampled-*"))
