"""What people see of a cache: summaries, responses in colour, a page that is safe to open; and what is refused."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.conftest import Models, WriteRows
from tests.pipeline.conftest import Filled, dense_logprobs
from transformers import AutoTokenizer

from adpa import InspectReport, inspect_cache, precompute
from adpa.data.cache.responses import ResponseSet, make_response_set, read_response_sets, write_response_set
from adpa.data.cache.set_records import SetRecord
from adpa.errors import AdpaError, CacheError, DamagedFileError, ListedError, OptionError
from adpa.pipeline.terminal.inspection import show_inspection
from adpa.pipeline.terminal.inspection_html import page_title
from adpa.pipeline.terminal.token_colours import STEPS, TEXTS, colour, step


def response_set(cache: Path, name: str) -> ResponseSet:
    (found,) = (found for found in read_response_sets(cache) if found.info.name == name)
    return found


def as_text(report: InspectReport, colours: bool = False, width: int = 80) -> str:
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        legacy_windows=False,
    )
    console.print(show_inspection(report))
    written = console.file
    assert isinstance(written, StringIO)
    return written.getvalue()


def test_a_whole_cache_is_summarised_and_asks_for_a_choice(filled: Filled) -> None:
    report = inspect_cache(filled.cache)
    names = [summary.response_set.partition("-")[0] for summary in report.summaries]
    assert names == ["sampled", "chosen", "rejected"], "the newest first"
    assert (report.responses, report.left_out, report.html) == ([], [], None)
    text = as_text(report)
    assert "Choose one with --response-set and --scoring" in text
    assert "teacher p ≥ 0.05" in text
    assert all(summary.scoring in text for summary in report.summaries)


def test_the_numbers_are_those_of_the_models(filled: Filled) -> None:
    report = inspect_cache(filled.cache, response_set="chosen", count=2)
    assert len(report.responses) == 2
    sequence = response_set(filled.cache, "chosen").sequences()[1]
    teacher, reference = (
        dense_logprobs(model, sequence).astype(np.float64) for model in (filled.models.teacher, filled.models.reference)
    )
    tokens = report.responses[1].tokens
    assert [token.id for token in tokens] == sequence.response_ids.tolist()
    for place, token in enumerate(tokens):
        assert token.logprob == pytest.approx(teacher[place, token.id], abs=1e-4)
        assert token.advantage == pytest.approx(teacher[place, token.id] - reference[place, token.id], abs=1e-4)
        best = np.argsort(-teacher[place])[:5].tolist()
        assert [other.id for other in token.alternatives] == best
        for other in token.alternatives:
            assert other.probability == pytest.approx(
                math.exp(teacher[place, other.id]), rel=2e-2
            )  # float16 in the cache
            assert other.advantage == pytest.approx(teacher[place, other.id] - reference[place, other.id], rel=2e-3)


def test_prompt_and_response_are_the_text_that_was_scored(filled: Filled) -> None:
    report = inspect_cache(filled.cache, response_set="chosen", count=100)
    rows = {json.dumps(row): row for row in map(json.loads, filled.data.read_text().splitlines())}
    assert len(report.responses) == len(rows) == 8
    said = {"".join(token.text for token in response.tokens) for response in report.responses}
    assert said == {row["chosen"][0]["content"] + "<|im_end|>" for row in rows.values()}
    for response in report.responses:
        assert [token.special for token in response.tokens] == [False] * (len(response.tokens) - 1) + [True]
        assert any(f"user\n{row['prompt'][0]['content']}<|im_end|>" in response.prompt for row in rows.values())


def test_an_example_is_shown_with_all_its_responses(filled: Filled) -> None:
    wanted = response_set(filled.cache, "sampled").table["example_id"][5].as_py()
    report = inspect_cache(filled.cache, response_set="sampled", example=wanted[:12], count=1)
    assert [response.example_id for response in report.responses] == [wanted, wanted], "two samples to a prompt"


def test_the_terminal_shows_tokens_a_legend_and_the_strongest_tokens(filled: Filled) -> None:
    report = inspect_cache(filled.cache, response_set="rejected", count=1)
    (response,), (summary,) = report.responses, report.summaries
    text = as_text(report)
    assert f"example {response.example_id}" in text
    assert "".join(token.text for token in response.tokens) in text
    strongest = max(response.tokens, key=lambda token: abs(token.value))
    assert strongest.advantage is not None
    lines = [line.split() for line in text.splitlines()]
    assert f"{strongest.probability:.2f}" in {cell for cells in lines if cells[:1] == ["p"] for cell in cells}
    assert f"{strongest.advantage:+.2f}" in {cell for cells in lines if cells[:1] == ["A"] for cell in cells}
    assert "p: its probability, A: advantage" in text
    assert f"{-summary.colour_scale:+.2g}" in text
    assert f"teacher {filled.models.teacher}, reference {filled.models.reference}" in text.replace("\n", "")
    coloured = as_text(report, colours=True)
    for token in response.tokens:
        style = colour(token.value, summary.colour_scale)
        assert style.bgcolor is not None
        assert style.bgcolor.triplet is not None
        assert "48;2;{};{};{}m{}".format(*style.bgcolor.triplet, token.text) in coloured


HOSTILE = '<script>alert(1)</script> {{ 7 * 7 }} " onclick="x\x1b[31m\u202e & 天気 🦊\n\nend'


@pytest.fixture(scope="module")
def hostile(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, without a reference, of what somebody wrote who means ill."""
    folder = tmp_path_factory.mktemp("hostile")
    row = {"prompt": f"Say {HOSTILE}", "chosen": HOSTILE, "rejected": "No."}
    (folder / "prefs.jsonl").write_text(json.dumps(row) + "\n")
    precompute(teacher=str(models.teacher), data=str(folder / "prefs.jsonl"), cache=folder / "cache", top_k=3)
    return folder / "cache"


class Page(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements that are closed in the wrong order"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_the_summary_the_prompt_and_every_alternative(filled: Filled, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    report = inspect_cache(filled.cache, response_set="chosen", count=2, html=file)
    assert report.html == str(file)
    page = Page(file.read_text())
    assert page.open == []
    assert page.attributes.count(("class", "card")) == sum(len(response.tokens) for response in report.responses)
    assert report.summaries[0].response_set in page.text
    for response in report.responses:
        assert response.prompt.strip() in page.text
        for token in response.tokens:
            for other in token.alternatives:
                assert f"{other.id}" in page.text
                assert f"{other.probability:.4f}" in page.text
                assert f"{other.advantage:+.3f}" in page.text


def test_the_page_says_what_it_shows_and_no_folder_of_it(filled: Filled, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    inspect_cache(filled.cache, response_set="rejected", count=1, html=file)
    page = file.read_text()
    models = filled.models
    title = f"dvantages of {models.teacher.name} over {models.reference.name} on rejected responses of prefs.jsonl"
    assert f"<title>adpa: a{title}</title>" in page
    assert f"<h1>A{title}</h1>" in page
    assert f"<td>{models.teacher.name}</td>" in page
    assert str(filled.data.parent) not in page
    assert str(models.teacher.parent) not in page


def test_a_page_of_a_cache_without_a_record_or_a_reference_has_a_title_too(hostile: Path, tmp_path: Path) -> None:
    (summary,) = inspect_cache(hostile, response_set="chosen").summaries
    assert page_title(summary, None) == f"log-probabilities of {Path(summary.teacher).name} on chosen responses"
    record = SetRecord("org/prefs", "train", "2026-11-28T14:02:00.000000+00:00")
    assert page_title(replace(summary, teacher="org/large", reference="org/sft"), record) == (
        "advantages of org/large over org/sft on chosen responses of org/prefs split train"
    )


def test_the_page_has_the_colours_of_the_terminal(filled: Filled, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    report = inspect_cache(filled.cache, response_set="chosen", count=1, html=file)
    (response,), (summary,), page = report.responses, report.summaries, file.read_text()
    for number, background in enumerate(STEPS):
        assert f".step{number} {{ background: {background}; color: {TEXTS[number]}; }}" in page
    shown = re.findall(r'class="token step(\d)', page)
    assert shown == [str(step(token.value, summary.colour_scale)) for token in response.tokens]


def test_the_page_is_safe_to_open(hostile: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    inspect_cache(hostile, response_set="chosen", html=file)
    page = Page(file.read_text())
    assert {"script", "link", "img", "iframe", "a"}.isdisjoint(page.tags)
    assert {name for name, _ in page.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "tabindex", "style",
    }  # fmt: skip
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert "http://" not in file.read_text()
    assert "https://" not in file.read_text()
    assert '<script>alert(1)</script> {{ 7 * 7 }} " onclick="x␛[31m\\u{202e} & 天気 🦊\n\nend' in page.text
    assert not {"\x1b", "\u202e"} & set(file.read_text())


def test_the_terminal_gets_no_control_characters_and_no_markup(hostile: Path) -> None:
    report = inspect_cache(hostile, response_set="chosen")
    text = as_text(report)
    assert not {"\x1b", "\u202e"} & set(text)
    assert "<script>alert(1)</script> {{ 7 * 7 }}" in text
    assert "␛[31m\\u{202e}" in text
    parts = [token.part for token in report.responses[0].tokens if token.label.startswith((" 🦊(", "🦊("))]
    assert parts == [1, 2, 3, 4], "four tokens make the character"
    assert "🦊⁺⁺⁺↵\n↵\nend<|im_end|>" in text, "a mark stands for each of the others"
    assert "⁺ one more token of the character before it" in text


def test_without_a_reference_colours_are_of_the_log_probability(hostile: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    report = inspect_cache(hostile, response_set="chosen", html=file)
    (summary,), (response,) = report.summaries, report.responses
    assert (summary.token_advantage, summary.topk_advantage) == (None, None)
    assert (summary.plausible, summary.implausible) == (None, None)
    assert all(token.advantage is None and token.value == token.logprob <= 0 for token in response.tokens)
    assert all(len(token.alternatives) == 3 for token in response.tokens), "K is 3"
    text = as_text(report)
    assert "no reference, hence no advantages" in text
    assert "log-probability" in text
    assert "no reference, hence no advantages" in file.read_text()


def test_a_report_can_be_written_as_json(filled: Filled) -> None:
    report = asdict(inspect_cache(filled.cache, response_set="chosen", count=1))
    read = json.loads(json.dumps(report, allow_nan=False))
    assert read["summaries"][0]["topk_advantage"]["quantiles"].keys() >= {"1%", "50%", "99%"}


def refused(error: type[AdpaError], cache: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        inspect_cache(cache, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_shown_is_refused(filled: Filled, tmp_path: Path) -> None:
    cache = filled.cache
    assert refused(OptionError, cache, count=0) == "--count 0; expected at least 1"
    assert "no cache there" in refused(CacheError, tmp_path)
    assert "--scoring f00d: the cache has none; found " in refused(CacheError, cache, scoring="f00d")
    with pytest.raises(ListedError, match="--response-set f00d: the cache has none; name one of these:\n"):
        inspect_cache(cache, response_set="f00d")
    for path in (tmp_path, tmp_path / "nowhere" / "page.html"):
        assert f"--html {path}: cannot be written there" in refused(OptionError, cache, html=path)
    message = refused(CacheError, cache, response_set="chosen", example="zz")
    assert "--example zz: no such example; found " in message
    assert message.endswith("and 3 more; name one of them")
    for option in ("example", "response_set", "scoring"):
        message = refused(OptionError, cache, **{option: ""})
        assert message == f"--{option.replace('_', '-')} '': an empty value; write one, or leave the option out"


@pytest.mark.parametrize("option", ["example", "html"])
def test_several_sets_are_listed_where_one_is_needed(option: str, filled: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {option: tmp_path / "page.html" if option == "html" else "0"}
    with pytest.raises(ListedError) as caught:
        inspect_cache(filled.cache, **options)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("3 combinations of responses and scoring fit; choose one by the options")
    assert [re.findall("--response-set ([a-z]+)-.{16} --scoring .{16}$", line)[0] for line in lines] == [
        "sampled", "chosen", "rejected"
    ]  # fmt: skip
    assert not (tmp_path / "page.html").exists()


def test_an_example_outranks_those_that_only_begin_like_it(
    models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    precompute(teacher=str(models.teacher), data=str(write_rows([row, row])), cache=tmp_path / "cache", top_k=3)
    first, second = response_set(tmp_path / "cache", "chosen").table["example_id"].to_pylist()
    assert second == f"{first}:2"
    (shown,) = inspect_cache(tmp_path / "cache", response_set="chosen", example=first).responses
    assert shown.example_id == first


def test_a_damaged_tokenizer_is_named(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled.cache, cache)
    shutil.rmtree(cache / "tokenizers")
    assert "not the tokenizer that was written" in refused(DamagedFileError, cache, response_set="chosen")
    assert len(inspect_cache(cache).summaries) == 3, "a summary needs no tokenizer"


def test_every_token_that_ends_a_response_is_shown_as_special(few_words: Filled, tmp_path: Path) -> None:
    """A student may end its turns in several ways, also with a token that its tokenizer does not mark as special."""
    cache = Path(shutil.copytree(few_words.cache, tmp_path / "cache"))
    (sampled,) = (one for one in read_response_sets(cache) if one.info.name == "sampled")
    assert sampled.info.sampling is not None
    last = sorted({int(sequence.response_ids[-1]) for sequence in sampled.sequences()} - {0, 1, 2})[:2]
    several = replace(sampled.info, sampling=replace(sampled.info.sampling, stops=tuple(last)))
    ids = sampled.table["example_id"].to_pylist()
    rows = [(one, row.prompt_ids, row.response_ids) for one, row in zip(ids, sampled.sequences(), strict=True)]
    write_response_set(cache, responses := make_response_set(several, rows))

    report = inspect_cache(cache, response_set=responses.id, count=100)
    tokenizer = AutoTokenizer.from_pretrained(few_words.models.teacher)
    ends = [token for response in report.responses for token in response.tokens if token.id in last]
    assert {token.id for token in ends} == set(last)
    assert all(token.special for token in ends)
    assert {token.text.strip() for token in ends} == set(tokenizer.convert_ids_to_tokens(last))
    before = inspect_cache(cache, response_set=sampled.id, count=100)
    assert not any(token.special for response in before.responses for token in response.tokens if token.id in last)
    assert report.summaries[0].made == f"{before.summaries[0].made}, ends at 2 or {last[0]} or {last[1]}"
    assert report.summaries[0].made in " ".join(as_text(report).split())
