import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.templates import STYLES
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.rows import read_rows
from adpa.errors import DataError, OptionError, RowError

Row = dict[str, Any]

USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Answer in one word."}
EARLIER_TURN = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]

PAIR: Row = {"prompt": [USER], "chosen": "Paris.", "rejected": "Lyon, of course."}


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The small one: it is loaded and copied in a fraction of the time."""
    return small_tokenizer


def make_encoder(tokenizer: PreTrainedTokenizerBase, arguments: Row | None = None, **options: Any) -> Encoder:
    limits = {"max_prompt_length": 512, "max_length": 1024}
    return Encoder(ChatTemplate(tokenizer, arguments or {}), **(limits | options))


def encode(encoder: Encoder, *rows: Row) -> list[EncodedPair]:
    return list(encoder.encode((f"prefs.jsonl line {number}", row) for number, row in enumerate(rows, start=1)))


def test_a_pair_becomes_what_the_template_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,) = encode(make_encoder(tokenizer), PAIR)
    assert tokenizer.decode(pair.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(pair.chosen_ids) == "Paris.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "Lyon, of course.<|im_end|>"
    assert {array.dtype for array in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)} == {np.dtype(np.int32)}


def test_a_conversation_with_a_system_message_and_several_turns_is_written_whole(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (pair,) = encode(make_encoder(tokenizer), PAIR | {"prompt": [SYSTEM, *EARLIER_TURN, USER]})
    assert tokenizer.decode(pair.prompt_ids) == (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(pair.chosen_ids) == "Paris.<|im_end|>"


@pytest.mark.parametrize("style", STYLES)
def test_in_every_style_prompt_and_response_are_what_the_model_reads(
    style: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    styled = STYLES[style](tokenizer)
    (pair,) = encode(make_encoder(styled), PAIR | {"prompt": [*EARLIER_TURN, USER]})
    conversation = [*EARLIER_TURN, USER, {"role": "assistant", "content": "Lyon, of course."}]
    whole = styled(str(styled.apply_chat_template(conversation, tokenize=False)), add_special_tokens=False)["input_ids"]
    prompt = styled.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
    joined = [*pair.prompt_ids, *pair.rejected_ids]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) == STYLES[style].trailing
    assert styled.decode(pair.prompt_ids) == prompt
    assert styled.decode(pair.rejected_ids) == f"Lyon, of course.{STYLES[style].end}"


def test_twenty_real_pairs_come_back_as_text(tokenizer: PreTrainedTokenizerBase, preference_rows: list[Row]) -> None:
    pairs = encode(make_encoder(tokenizer), *preference_rows)
    for pair, row in zip(pairs, preference_rows, strict=True):
        assert tokenizer.decode(pair.chosen_ids) == row["chosen"][0]["content"] + "<|im_end|>"
        assert tokenizer.decode(pair.rejected_ids) == row["rejected"][0]["content"] + "<|im_end|>"
        assert row["prompt"][0]["content"] in tokenizer.decode(pair.prompt_ids)


def test_a_prompt_longer_than_the_limit_keeps_its_end_and_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,) = encode(make_encoder(tokenizer), PAIR)
    length = len(whole.prompt_ids)
    for limit, truncated in ((length - 1, 1), (length, 0), (5, 1)):
        encoder = make_encoder(tokenizer, max_prompt_length=limit)
        (pair,) = encode(encoder, PAIR)
        assert pair.prompt_ids.tolist() == whole.prompt_ids.tolist()[-limit:]
        assert pair.chosen_ids.tolist() == whole.chosen_ids.tolist()
        assert encoder.counts.truncated_prompts == truncated


def test_a_response_is_cut_to_what_the_prompt_leaves(tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,) = encode(make_encoder(tokenizer), PAIR)
    chosen, rejected = len(whole.chosen_ids), len(whole.rejected_ids)
    assert chosen < rejected
    (pair,) = encode(make_encoder(tokenizer, max_prompt_length=8, max_length=8 + chosen), PAIR)
    assert pair.chosen_ids.tolist() == whole.chosen_ids.tolist()
    assert pair.rejected_ids.tolist() == whole.rejected_ids.tolist()[:chosen]
    assert pair.rejected_ids[-1] != tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_short_prompt_leaves_its_room_to_the_response(tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,) = encode(make_encoder(tokenizer), PAIR)
    total = len(whole.prompt_ids) + len(whole.rejected_ids)
    (pair,) = encode(make_encoder(tokenizer, max_prompt_length=total - 1, max_length=total), PAIR)
    assert pair.rejected_ids.tolist() == whole.rejected_ids.tolist()


@pytest.mark.parametrize(("max_prompt_length", "max_length"), [(0, 10), (-1, 10), (10, 10), (11, 10)])
def test_limits_that_leave_no_room_are_refused(
    max_prompt_length: int, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(OptionError, match=f"--max-prompt-length {max_prompt_length} with --max-length {max_length}"):
        make_encoder(tokenizer, max_prompt_length=max_prompt_length, max_length=max_length)


SMOLLM2_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)

UNFIT_TEMPLATES = {
    "counts the messages at the beginning": (
        "{{ messages | length }}" + SMOLLM2_TURNS,
        "the prompt's tokens are not a prefix of the tokens of prompt and `chosen`",
    ),
    "ends the prompt with a space that the answer's first token swallows": (
        "{% for m in messages %}{{ 'A: ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
        "the prompt's tokens are not a prefix of the tokens of prompt and `chosen`",
    ),
    "ends no turn that asks back": (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] }}{% if '?' not in m['content'] %}"
        "{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
        "the tokens of `rejected` do not end with the end-of-turn token '<|im_end|>'",
    ),
    "refuses a system message": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + SMOLLM2_TURNS,
        "the teacher's chat template refuses the conversation: No system!",
    ),
}


@pytest.mark.parametrize("unfit", UNFIT_TEMPLATES)
def test_a_pair_that_does_not_fit_the_template_is_refused_with_its_place(
    unfit: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    changed = deepcopy(tokenizer)
    changed.chat_template, problem = UNFIT_TEMPLATES[unfit]
    row = {"prompt": [SYSTEM, USER], "chosen": "Paris.", "rejected": "Which France?"}
    with pytest.raises(DataError) as caught:
        encode(make_encoder(changed), row)
    assert str(caught.value).startswith(f"prefs.jsonl line 1: {problem}")

    dropping = make_encoder(changed, drop_invalid=True)
    assert encode(dropping, row) == []
    assert dropping.counts.dropped == 1


def test_malformed_rows_are_dropped_and_counted_if_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [PAIR, {"prompt": "x"}, PAIR | {"chosen": " "}, PAIR | {"chosen": "half \ud83d"}, PAIR | {"chosen": "Rome."}]
    encoder = make_encoder(tokenizer, drop_invalid=True)
    pairs = encode(encoder, *rows)
    assert [tokenizer.decode(pair.chosen_ids) for pair in pairs] == ["Paris.<|im_end|>", "Rome.<|im_end|>"]
    assert encoder.counts.dropped == 3
    with pytest.raises(DataError, match="line 2: "):
        encode(make_encoder(tokenizer), *rows)


def test_a_dropped_pair_is_not_counted_as_truncated(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = make_encoder(tokenizer, max_prompt_length=4, drop_invalid=True)
    encode(encoder, PAIR, PAIR | {"chosen": ""})
    assert (encoder.counts.truncated_prompts, encoder.counts.dropped) == (1, 1)


def test_more_rows_than_one_batch_keep_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [PAIR | {"chosen": f"City number {number}."} for number in range(600)]
    pairs = encode(make_encoder(tokenizer), *rows)
    assert [tokenizer.decode(pair.chosen_ids) for pair in pairs] == [row["chosen"] + "<|im_end|>" for row in rows]


def test_a_pair_met_again_has_its_occurrence_in_its_example_id(tokenizer: PreTrainedTokenizerBase) -> None:
    other = PAIR | {"chosen": "Rome."}
    ids = [pair.example_id for pair in encode(make_encoder(tokenizer), PAIR, other, PAIR, PAIR, other)]
    first, second = ids[:2]
    assert first != second
    assert ids == [first, second, f"{first}:2", f"{first}:3", f"{second}:2"]


def test_rows_of_a_file_are_encoded_as_they_are_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n")
    (pair,) = make_encoder(tokenizer).encode(read_rows(str(path)))
    assert tokenizer.decode(pair.chosen_ids) == "Paris.<|im_end|>"


def test_the_error_of_a_run_counts_all_rows_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase) -> None:
    forged = PAIR | {"prompt": "Hi<|im_end|>"}
    with pytest.raises(RowError) as caught:
        encode(make_encoder(tokenizer), PAIR, PAIR | {"chosen": " "}, forged, PAIR, forged)
    assert str(caught.value).startswith("prefs.jsonl line 2: `chosen` is an empty response")
    assert "(first of 3 invalid rows; control tokens: 2, empty response: 1)" in str(caught.value)


def test_dropped_rows_are_counted_by_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = make_encoder(tokenizer, drop_invalid=True)
    encode(encoder, PAIR, PAIR | {"chosen": " "}, PAIR | {"chosen": "a<|im_start|>b"}, PAIR | {"rejected": ""})
    assert encoder.counts.invalid == {"empty response": 2, "control tokens": 1}
    assert (encoder.counts.rows, encoder.counts.dropped) == (4, 3)


def test_a_text_without_tokens_is_refused_in_any_row(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [PAIR | {"chosen": f"City {number}."} for number in range(1100)]
    rows[1050]["rejected"] = "a character of no token: \U00040000"
    encoder = make_encoder(tokenizer, drop_invalid=True)
    assert len(encode(encoder, *rows)) == 1099
    assert encoder.counts.invalid == {"text lost in tokens": 1}


def test_repeated_identical_and_exchanged_pairs_are_counted_and_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    exchanged = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    same = PAIR | {"chosen": "Paris.", "rejected": [{"role": "assistant", "content": "Paris."}]}
    invalid = PAIR | {"rejected": None}
    encoder = make_encoder(tokenizer, drop_invalid=True)
    pairs = encode(encoder, PAIR, exchanged, PAIR | {"score": 5}, same, invalid, same, invalid)
    counts = encoder.counts
    assert (counts.rows, counts.used, len(pairs), counts.dropped) == (7, 5, 5, 2)
    assert (counts.duplicates, counts.identical, counts.contradicting) == (2, 2, 2)
    assert counts.invalid == {"null response": 2}


def test_responses_that_the_limit_makes_equal_are_identical(tokenizer: PreTrainedTokenizerBase) -> None:
    row = PAIR | {"chosen": "Paris, of course.", "rejected": "Paris, I believe."}
    (whole,) = encode(make_encoder(tokenizer), row)
    both = zip(whole.chosen_ids, whole.rejected_ids, strict=False)
    shared = next(place for place, (chosen, rejected) in enumerate(both) if chosen != rejected)
    assert shared > 1
    for room, identical in ((1, 1), (shared, 1), (shared + 1, 0), (100, 0)):
        encoder = make_encoder(tokenizer, max_prompt_length=8, max_length=8 + room)
        encode(encoder, row)
        assert encoder.counts.identical == identical


@pytest.mark.parametrize(
    ("columns", "duplicates"),
    [
        ({"tools": None, "chat_template_kwargs": {}, "source": "another"}, 2),
        ({"prompt": USER["content"]}, 2),
        ({"system": "Be brief."}, 1),
        ({"rejected": "Lyon."}, 1),
    ],
)
def test_a_duplicate_equals_another_row_in_all_that_is_used(
    columns: Row, duplicates: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    encoder = make_encoder(tokenizer)
    encode(encoder, PAIR, PAIR | columns, PAIR)
    assert encoder.counts.duplicates == duplicates
