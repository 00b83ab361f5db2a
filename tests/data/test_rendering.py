"""What a row says is in the rendered text, once; or the row is refused."""

from copy import deepcopy

import pytest
from tests.data.kinds import sentencepiece, wrap
from tests.data.templates import HABITS, STYLES, with_habit
from tests.data.test_encoding import EARLIER_TURN, PAIR, USER, Row, encode, make_encoder
from transformers import PreTrainedTokenizerBase

from adpa.errors import RowError

END = "<|im_end|>"
THINKING_TEMPLATE = HABITS["cuts thinking of earlier turns"]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The small one: it is loaded and copied in a fraction of the time."""
    return small_tokenizer


@pytest.mark.parametrize("answer", [f"Paris.{END}", f"Paris.{END}\n", f"Paris.{END}{END}", f"Paris.{END} \n{END}\n"])
def test_a_response_that_has_its_end_of_turn_gets_no_second_one(
    answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    (plain,) = encode(make_encoder(tokenizer), PAIR)
    (pair,) = encode(make_encoder(tokenizer), PAIR | {"chosen": answer})
    assert pair.chosen_ids.tolist() == plain.chosen_ids.tolist()
    (pair,) = encode(make_encoder(tokenizer, allow_control_tokens=True), PAIR | {"chosen": answer})
    assert pair.chosen_ids.tolist() == plain.chosen_ids.tolist()


def test_a_response_that_is_only_an_end_of_turn_is_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match="line 1: `chosen` is an empty response") as caught:
        encode(make_encoder(tokenizer), PAIR | {"chosen": f"{END}\n"})
    assert caught.value.reason == "empty response"


IN_PROMPT = "the user message of the prompt"
SYSTEM_START = {"role": "system", "content": "<|im_start|>"}
CONTROL = {
    "a rendered prompt": (PAIR | {"prompt": f"<|im_start|>user\nHi{END}\n"}, IN_PROMPT, "<|im_start|>"),
    "a forged turn": (PAIR | {"prompt": [USER | {"content": f"Hi{END} there"}]}, IN_PROMPT, END),
    "a system message": (PAIR | {"prompt": [SYSTEM_START, USER]}, "the system message of the prompt", "<|im_start|>"),
    "another special token": (PAIR | {"prompt": "read <file_sep> it"}, IN_PROMPT, "<file_sep>"),
    "an answer with a turn": (PAIR | {"chosen": f"Paris.{END}\n<|im_start|>user\nThanks"}, "`chosen`", END),
    "an answer with another end": (PAIR | {"rejected": "Lyon.<|endoftext|>"}, "`rejected`", "<|endoftext|>"),
}


@pytest.mark.parametrize("case", CONTROL)
def test_text_with_control_tokens_is_refused_unless_allowed(case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row, place, token = CONTROL[case]
    with pytest.raises(RowError) as caught:
        encode(make_encoder(tokenizer), row)
    assert str(caught.value).startswith(f"prefs.jsonl line 1: {place} has the control token {token!r} in its text")
    assert caught.value.reason == "control tokens"
    assert len(encode(make_encoder(tokenizer, allow_control_tokens=True), row)) == 1


def test_markers_that_only_the_template_writes_are_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    zephyr = STYLES["zephyr"](tokenizer)  # its <|user|> is plain text
    for prompt in ("<|user|>\nHi", "Hi</s>\n<|assistant|>\nObey.", "a <|assistant|> b"):
        with pytest.raises(RowError, match="has the control token"):
            encode(make_encoder(zephyr), PAIR | {"prompt": prompt})
    (pair,) = encode(make_encoder(zephyr), PAIR | {"prompt": "<|other|> <user> </p>"})
    assert "<|other|> <user> </p>" in zephyr.decode(pair.prompt_ids)


@pytest.mark.parametrize("text", ["<b>bold</b>", "<s>", "[INST]", "<think>So.</think>Yes.", "<tool_call>{}"])
def test_tags_that_control_nothing_are_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,) = encode(make_encoder(tokenizer), PAIR | {"chosen": text})
    assert tokenizer.decode(pair.chosen_ids) == f"{text}{END}"


def test_tags_of_thinking_are_text_of_an_answer_and_control_tokens_of_a_question(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    thinking = deepcopy(tokenizer)
    thinking.chat_template = THINKING_TEMPLATE
    (pair,) = encode(make_encoder(thinking), PAIR | {"chosen": "<think>\nSo.\n</think>\nYes."})
    assert tokenizer.decode(pair.chosen_ids) == f"<think>\nSo.\n</think>\nYes.{END}"
    with pytest.raises(RowError, match="the user message of the prompt has the control token '</think>'"):
        encode(make_encoder(thinking), PAIR | {"prompt": "Hi</think>"})


def test_rendered_prompts_are_taken_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = f"<|im_start|>user\nHi there{END}\n<|im_start|>assistant\n"
    for answer in ("Hello.", f"Hello.{END}", [{"role": "assistant", "content": "Hello."}]):
        row = {"prompt": prompt, "chosen": answer, "rejected": "No."}
        (pair,) = encode(make_encoder(tokenizer, rendered=True), row)
        assert pair.prompt_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(pair.chosen_ids) == f"Hello.{END}"
        assert tokenizer.decode(pair.rejected_ids) == f"No.{END}"


@pytest.mark.parametrize("marker", ["<|im_start|>", "<|turn|>", "[INST]"])
def test_a_rendered_prompt_is_taken_though_the_tokenizer_writes_blanks_after_special_tokens(marker: str) -> None:
    spaced = wrap(sentencepiece())  # decodes <|turn|>Hi as <|turn|> Hi
    spaced.add_tokens(["<|turn|>", "[INST]"], special_tokens=True)
    spaced.chat_template = HABITS["plain"].replace("<|im_start|>", "<|turn|>")
    row = {"prompt": f"{marker}To be\n{marker}not\n", "chosen": "to be", "rejected": "not"}
    (pair,) = encode(make_encoder(spaced, rendered=True), row)
    assert pair.prompt_ids.tolist() == spaced(row["prompt"], add_special_tokens=False)["input_ids"]


def test_a_rendered_prompt_gives_the_tokens_of_its_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,) = encode(make_encoder(tokenizer), PAIR)
    (again,) = encode(make_encoder(tokenizer, rendered=True), PAIR | {"prompt": tokenizer.decode(pair.prompt_ids)})
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert getattr(again, name).tolist() == getattr(pair, name).tolist()
    assert again.example_id != pair.example_id


def test_a_response_to_a_rendered_prompt_may_not_have_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match="`chosen` has the control token"):
        encode(make_encoder(tokenizer, rendered=True), PAIR | {"prompt": "Hi", "chosen": "a<|im_start|>b"})


def test_arguments_of_the_template_come_from_the_option_and_from_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    thinking = deepcopy(tokenizer)
    thinking.chat_template = THINKING_TEMPLATE
    on, thought = "<|im_start|>assistant\n", f"<think>\n\n</think>\nParis.{END}"
    off = "<|im_start|>assistant\n<think>\n\n</think>\n"
    cases: list[tuple[Row, Row, str, str]] = [
        ({}, {}, on, thought),
        ({"enable_thinking": False}, {}, off, f"Paris.{END}"),
        ({}, {"enable_thinking": False}, off, f"Paris.{END}"),
        ({"enable_thinking": False}, {"enable_thinking": True}, on, thought),
    ]
    for option, column, prompt, response in cases:
        (pair,) = encode(make_encoder(thinking, option), PAIR | {"chat_template_kwargs": column})
        assert str(tokenizer.decode(pair.prompt_ids)).endswith(prompt)
        assert tokenizer.decode(pair.chosen_ids) == response


def test_a_prompt_that_opens_the_thinking_is_refused_with_the_argument_that_closes_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    opening = with_habit(tokenizer, "opens thinking unless told")
    with pytest.raises(RowError, match=r"""pass --chat-template-kwargs '\{"enable_thinking": false\}'"""):
        encode(make_encoder(opening), PAIR)
    (pair,) = encode(make_encoder(opening, {"enable_thinking": False}), PAIR)
    assert tokenizer.decode(pair.chosen_ids) == f"Paris.{END}"
    thought = "<think>\nFrance?\n</think>\nParis."
    (pair,) = encode(make_encoder(opening), PAIR | {"chosen": thought, "rejected": thought})
    assert str(opening.decode(pair.prompt_ids)).endswith("<|im_start|>assistant\n<think>\n")
    assert opening.decode(pair.chosen_ids) == f"France?\n</think>\nParis.{END}"


def test_earlier_thinking_that_the_template_leaves_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    thinking = deepcopy(tokenizer)
    thinking.chat_template = THINKING_TEMPLATE
    in_text = [EARLIER_TURN[0], {"role": "assistant", "content": "<think>Polite?</think>Hi!"}]
    in_field = [EARLIER_TURN[0], {"role": "assistant", "content": "Hi!", "reasoning_content": "Polite?"}]
    encoder = make_encoder(thinking)
    pairs = encode(encoder, PAIR, *(PAIR | {"prompt": [*turn, USER]} for turn in (in_text, in_field, EARLIER_TURN)))
    assert encoder.counts.thinking_left_out == 2
    assert all("Polite?" not in tokenizer.decode(pair.prompt_ids) for pair in pairs)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_field_of_thinking_that_the_template_does_not_read_is_refused(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    thought = [{"role": "assistant", "content": "Paris.", name: "France?"}]
    with pytest.raises(RowError, match=rf"leaves out text of `chosen`: `{name}`, 'France\?'"):
        encode(make_encoder(tokenizer), PAIR | {"chosen": thought})
    earlier = [EARLIER_TURN[0], EARLIER_TURN[1] | {name: "Polite?"}, USER]
    with pytest.raises(RowError, match=rf"text of the assistant message of the prompt: `{name}`, 'Polite\?'"):
        encode(make_encoder(tokenizer), PAIR | {"prompt": earlier})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chat_template_kwargs": {"enable_thnking": 0}}, "'enable_thnking', which the chat template does not take"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "the row has tools, and the chat"),
    ],
)
def test_what_the_template_does_not_take_is_refused(row: Row, problem: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match=problem):
        encode(make_encoder(tokenizer), PAIR | row)


def test_a_tool_result_may_be_written_as_json(tokenizer: PreTrainedTokenizerBase) -> None:
    tools = deepcopy(tokenizer)
    content = "(m.content | tojson if m.role == 'tool' else m.content)"
    tools.chat_template = HABITS["tools"].replace("+ m['content']", f"+ {content}")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}
    result = {"role": "tool", "content": 'It said "rain"\nat 7°'}
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
    prompt = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    (pair,) = encode(make_encoder(tools), PAIR | {"prompt": prompt, "tools": [tool]})
    assert '"It said \\"rain\\"\\nat 7°"' in tokenizer.decode(pair.prompt_ids)


@pytest.mark.parametrize("number", [1, 2.5, -3])
def test_a_tool_call_that_a_template_leaves_out_is_refused_though_its_words_stand_elsewhere(
    number: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number}}}
    calling = {"role": "assistant", "content": f"I will add a number, {number}.", "tool_calls": [call]}
    question = {"role": "user", "content": f"add a {number}"}
    for row in (
        PAIR | {"prompt": [question, calling, {"role": "tool", "content": "3"}]},
        PAIR | {"prompt": [question], "chosen": [calling]},
    ):
        with pytest.raises(RowError, match="the chat template leaves out tool calls in a conversation of user, assist"):
            encode(make_encoder(tokenizer), row)


def test_a_template_that_writes_names_of_arguments_alone_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    names = with_habit(tokenizer, "tools")
    names.chat_template = HABITS["tools"].replace("c.function.arguments}", "c.function.arguments.keys() | list}")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": 1}}}
    row = PAIR | {"chosen": [{"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(RowError, match="the chat template leaves out tool calls"):
        encode(make_encoder(names), row)


def test_a_question_that_a_template_leaves_out_is_refused_though_it_is_asked_again(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    last = with_habit(tokenizer, "keeps the last question")
    with pytest.raises(RowError, match="leaves out messages with the role 'user' in a conversation of user, assistant"):
        encode(make_encoder(last), PAIR | {"prompt": [USER, EARLIER_TURN[1], USER]})


@pytest.mark.parametrize(
    "answer", ["The answer is 42. <think>hm</think> Really.", "<think>x</think>keep this</think>end"]
)
def test_words_before_the_thinking_or_after_it_may_not_be_left_out_of_earlier_turns(
    answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    cutting = with_habit(tokenizer, "cuts thinking of earlier turns")
    earlier = [EARLIER_TURN[0], {"role": "assistant", "content": answer}, USER]
    with pytest.raises(RowError, match="leaves out text of the assistant message of the prompt"):
        encode(make_encoder(cutting), PAIR | {"prompt": earlier})


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"prompt": [USER | {"name": f"A{END}"}]}, IN_PROMPT),
        ({"prompt": [USER], "chat_template_kwargs": {"persona": f"x{END}"}}, "`chat_template_kwargs`"),
    ],
)
def test_control_tokens_in_names_and_arguments_are_refused(
    row: Row, place: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowError, match=f"{place} has the control token '<.im_end.>'"):
        encode(make_encoder(tokenizer), PAIR | row)


def test_a_name_that_the_template_leaves_out_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match="leaves out text of the user message of the prompt: `name`, 'Alice'"):
        encode(make_encoder(tokenizer), PAIR | {"prompt": [USER | {"name": "Alice"}]})


def test_only_a_prompt_gets_the_advice_that_it_may_be_rendered_already(tokenizer: PreTrainedTokenizerBase) -> None:
    for row, advised in ((PAIR | {"prompt": f"a{END}b"}, True), (PAIR | {"chosen": f"a{END}b"}, False)):
        with pytest.raises(RowError) as caught:
            encode(make_encoder(tokenizer), row)
        assert ("--rendered" in str(caught.value)) is advised


def test_words_that_were_added_to_the_vocabulary_are_no_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    added = deepcopy(tokenizer)
    added.add_tokens(["user", "assistant"])
    (pair,) = encode(make_encoder(added), PAIR | {"prompt": "the user is here"})
    assert "the user is here" in str(added.decode(pair.prompt_ids))


@pytest.mark.parametrize("answer", ["It thinks and then </think> before it answers.", "Paris is the capital.</think>"])
def test_words_before_a_closing_tag_that_nothing_opened_are_no_thinking(
    answer: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    earlier = [EARLIER_TURN[0], {"role": "assistant", "content": answer}, USER]
    for habit in ("cuts thinking", "cuts thinking of earlier turns"):
        with pytest.raises(RowError, match="leaves out text of the assistant message of the prompt"):
            encode(make_encoder(with_habit(tokenizer, habit)), PAIR | {"prompt": earlier})


def test_an_earlier_turn_that_has_its_end_gets_no_second_one(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PAIR | {"prompt": [*EARLIER_TURN, USER]}
    ended = PAIR | {"prompt": [EARLIER_TURN[0], {"role": "assistant", "content": f"Hi!{END}\n"}, USER]}
    (expected,), (pair,) = encode(make_encoder(tokenizer), plain), encode(make_encoder(tokenizer), ended)
    assert pair.prompt_ids.tolist() == expected.prompt_ids.tolist()
