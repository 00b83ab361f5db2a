"""verify finds no fault in what precompute wrote, whatever the models and the settings; so --repair changes nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.conftest import MakeModel, Row, WriteRows
from tests.data.cache.test_responses import id_of
from tests.pipeline.cache.test_ls import as_text
from tests.pipeline.cache.test_verify import rewrite_signals
from tests.pipeline.conftest import SMALL, Filled
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adpa import (
    collect_garbage,
    export_cache,
    inspect_cache,
    list_cache,
    merge_cache,
    pack_cache,
    precompute,
    verify_cache,
)
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseSet, make_response_set, read_response_sets, write_response_set
from adpa.data.cache.shards import write_shard
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import CacheError

pytestmark = pytest.mark.slow

TOKENS = 96
PADDED = 500
MakePadded = Callable[..., str]


@pytest.fixture(scope="module")
def padded(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> MakePadded:
    """Makes a model whose embedding has more rows than the 96 of its tokenizer: ``padded(seed, rows, sharpness)``."""
    tokenizer = AutoTokenizer.from_pretrained(few_words.models.teacher)
    made: dict[tuple[Any, ...], str] = {}

    def make(seed: int, rows: int = PADDED, sharpness: float = 1.0) -> str:
        if (seed, rows, sharpness) not in made:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": rows}, initializer_range=0.5))
            model.lm_head.weight.data *= sharpness
            directory = tmp_path_factory.mktemp("padded")
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[seed, rows, sharpness] = str(directory)
        return made[seed, rows, sharpness]

    return make


def files(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def assert_whole(cache: Path) -> None:
    before = files(cache)
    report = verify_cache(cache, repair=True)
    assert (report.faults, report.set_aside, report.unknown) == ([], [], [])
    assert files(cache) == before


@pytest.mark.parametrize("options", [{"lossy": True}, {"top_p": 0.01}, {"lossy": True, "top_p": 0.01}])
def test_every_encoding_is_without_a_fault(options: dict[str, Any], few_words: Filled, tmp_path: Path) -> None:
    models = few_words.models
    common: dict[str, Any] = {"teacher": str(models.teacher), "data": str(few_words.data), "top_k": 50}
    precompute(**common, reference=str(models.reference), cache=tmp_path, **options)
    report = verify_cache(tmp_path)
    assert report.faults == []
    pack_cache(tmp_path)
    assert verify_cache(tmp_path).faults == []
    exported = export_cache(tmp_path, tmp_path.with_name(f"{tmp_path.name}.parquet"), response_set="chosen")
    rows = pq.read_table(exported.output).to_pylist()
    lengths = {len(ids) for row in rows for ids in row["topk_ids"]}
    assert lengths == {50} if "top_p" not in options else lengths != {50} and lengths <= set(range(1, 51))


def test_a_models_padding_is_no_fault_and_repair_makes_no_gap(
    make_model: MakeModel, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    """The top K of such a teacher has ids that the tokenizer lacks. They were called a fault, again and again."""
    teacher, reference, student = (str(make_model(seed, vocab_size=10_000)) for seed in (1, 2, 3))
    cache = tmp_path / "cache"
    common: dict[str, Any] = {"teacher": teacher, "reference": reference, "cache": cache}
    common |= {"data": str(write_rows(preference_rows[:3]))}
    assert precompute(**common).scored == 6
    assert precompute(**common, student=student, max_new_tokens=4).scored == 3
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    assert max(signals.row(number).topk_ids.max() for number in range(len(signals))) > 8192 * 17 / 16
    assert_whole(cache)
    assert precompute(**common).scored == 0
    assert precompute(**common, student=student, max_new_tokens=4).scored == 0
    shown = inspect_cache(cache, response_set="chosen", count=3).responses
    tokens = [token for response in shown for token in response.tokens]
    beyond = [other for token in tokens for other in token.alternatives if other.id > 8192]
    assert beyond
    assert all(other.text == f"⟨{other.id}⟩" for other in beyond), "a token without text is shown by its id"


SETTINGS: dict[str, dict[str, Any]] = {
    "K = 1": {"top_k": 1},
    "K = all ids of the model": {"top_k": PADDED},
    "K = all ids, lossy": {"top_k": PADDED, "lossy": True},
    "a nucleus": {"top_k": 30, "top_p": 0.5},
    "a nucleus, lossy": {"top_k": 30, "top_p": 0.5, "lossy": True},
    "no reference": {"reference": None},
    "prompts cut to one token": {"max_prompt_length": 1},
    "responses cut to one token": {"max_prompt_length": 8, "max_length": 9},
    "greedy samples": {},
    "many samples": {},
    "sharp models": {"teacher": 1e3, "reference": 1e3},
    "sharp models, lossy": {"teacher": 1e3, "reference": 30.0, "lossy": True},
    "models that know nothing": {"teacher": 0.0, "reference": 1e-4},
    "no padding": {"rows": TOKENS, "top_k": TOKENS},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "responses cut to one token": {"max_new_tokens": 1},
    "greedy samples": {"temperature": 0.0},
    "many samples": {"samples_per_prompt": 3, "sampling_top_p": 0.5},
}

FAST = ("K = all ids of the model", "a nucleus", "prompts cut to one token", "sharp models, lossy", "no padding")


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SETTINGS]
)
def test_what_precompute_wrote_is_without_a_fault(
    setting: str, few_words: Filled, padded: MakePadded, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"top_k": 20, "teacher": 1.0, "reference": 1.0} | SETTINGS[setting]
    rows = options.pop("rows", PADDED)
    options["teacher"] = padded(1, rows, options["teacher"])
    if options["reference"] is not None:
        options["reference"] = padded(2, rows, options["reference"])
    cache = tmp_path / "cache"
    options |= {"data": str(few_words.data), "cache": cache}
    precompute(**options)
    sampling: dict[str, Any] = {"student": padded(3, rows), "max_new_tokens": 5} | SAMPLINGS.get(setting, {})
    precompute(**options, **sampling)
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    for responses in read_response_sets(cache):
        assert (signals.locate(responses.table["key"]) >= 0).all()
    assert_whole(cache)


def test_a_row_that_lies_about_its_own_token_is_still_found(few_words: Filled, tmp_path: Path) -> None:
    """Ids beyond the tokenizer are possible; a likely token that is not among the likeliest is not."""
    cache = Path(shutil.copytree(few_words.cache, tmp_path / "cache"))
    place = rewrite_signals(cache, lambda row: replace(row, topk_ids=row.topk_ids + 60_000))
    (fault,) = verify_cache(cache).faults
    assert fault.place == place
    assert "the response's tokens are likelier than ids in the top K, but not among them" in fault.problem


def add_changed(cache: Location, name: str, **changes: Any) -> ResponseSet:
    """Adds a response set with the rows of another one, made in another way."""
    one = next(one for one in read_response_sets(cache) if one.info.name == name)
    stops = changes.pop("stops", None)
    if stops is not None:
        assert one.info.sampling is not None
        changes["sampling"] = replace(one.info.sampling, stops=stops)
    rows = [
        (example_id, sequence.prompt_ids, sequence.response_ids)
        for example_id, sequence in zip(one.table["example_id"].to_pylist(), one.sequences(), strict=True)
    ]
    changed = make_response_set(replace(one.info, **changes), rows)
    write_response_set(cache, changed)
    return changed


@pytest.mark.parametrize(
    ("name", "changes", "described"),
    [
        ("chosen", {"chat_template_kwargs": {"think": False}}, 'template arguments {"think": false}'),
        ("rejected", {"rendered": True}, "prompts rendered already"),
        ("sampled", {"stops": (5, 11)}, "ends at 2 or 5 or 11"),
    ],
    ids=["template arguments", "rendered", "stops"],
)
def test_every_command_knows_a_set_that_was_made_in_another_way(
    name: str, changes: dict[str, Any], described: str, few_words: Filled, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(few_words.cache, tmp_path / "cache"))
    changed = add_changed(cache, name, **changes)
    assert_whole(cache)
    listed = {one.name: one for one in list_cache(cache).sets}
    assert len(listed) == 4
    assert listed[changed.shard_prefix()].info == changed.info
    assert described in " ".join(as_text(list_cache(cache)).split())
    summaries = {one.response_set: one for one in inspect_cache(cache).summaries}
    assert described in summaries[changed.shard_prefix()].made
    assert sum(described in one.made for one in summaries.values()) == 1
    exported = export_cache(cache, tmp_path / "rows.parquet", response_set=changed.shard_prefix())
    assert exported.response_set == changed.shard_prefix()
    other = Path(shutil.copytree(few_words.cache, tmp_path / "other"))
    assert merge_cache(other, cache).failure == ""
    pack_cache(other)
    assert {one.id for one in read_response_sets(other)} == {one.id for one in read_response_sets(cache)}
    assert_whole(other)


def test_a_set_of_a_newer_adpa_is_no_damage_and_stays(few_words: Filled, tmp_path: Path) -> None:
    """Nobody sets it aside, and gc does not take its rows for garbage: every command asks for a newer adpa."""
    cache = Path(shutil.copytree(few_words.cache, tmp_path / "cache"))
    table = next(one for one in read_response_sets(cache) if one.info.name == "chosen").table
    made = json.dumps(json.loads(table.schema.metadata[b"adpa"]) | {"images": ["a"]}, sort_keys=True).encode()
    newer = table.replace_schema_metadata({"adpa": made})
    path = write_shard(cache / "responses", f"chosen-{id_of(made, newer)}", newer)
    before = files(cache)
    expected = f"{path}: of a newer format: it has the unknown field 'images'; install a newer adpa"
    refused: list[Callable[[], object]] = [
        lambda: verify_cache(cache, repair=True),
        lambda: collect_garbage(cache, yes=True),
        lambda: merge_cache(few_words.cache, cache),
        lambda: inspect_cache(cache),
    ]
    for command in refused:
        with pytest.raises(CacheError) as caught:
            command()
        assert (str(caught.value), caught.value.exit_code) == (expected, 2)
    assert files(cache) == before
    listing = list_cache(cache)
    assert (len(listing.sets), listing.unreadable) == (3, [expected])


def test_a_set_without_rows_is_no_fault(few_words: Filled, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(few_words.cache, tmp_path / "cache"))
    chosen = next(one for one in read_response_sets(cache) if one.info.name == "chosen")
    write_response_set(cache, empty := make_response_set(chosen.info, []))
    assert_whole(cache)
    assert next(one for one in list_cache(cache).sets if one.name == empty.shard_prefix()).rows == 0
