"""A response ends with the token that ends generation: after words, after a tool call, or when the next turn comes."""

import pytest
from tests.data.templates import ENDS_CALLS, GENERATION, HABITS, with_habit
from tests.data.test_chat_template import with_template
from tests.data.test_templates import encode, row_of
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair
from adpa.errors import ModelError, RowError

BY_ROLE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # the next role ends a turn
)


def test_a_call_may_end_with_a_token_of_its_own(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "ends calls by a token of their own")
    im_end, call = (tokenizer.get_vocab()[token] for token in ("<|im_end|>", "<|call|>"))
    template = ChatTemplate(tokenizer, eos_token_ids=(im_end, call))
    assert (template.turn_end.token_id, template.turn_end.trailing) == (im_end, 1)
    assert (template.call_end.token_id, template.call_end.trailing) == (call, 0)
    pair = encode(tokenizer, row_of("a tool call as the answer"))
    assert isinstance(pair, EncodedPair)
    assert (pair.chosen_ids[-1], pair.rejected_ids[-1]) == (call, im_end)
    assert tokenizer.decode(pair.chosen_ids) == '<tool_call>weather{"city": "Lyon"}<|call|>'


def test_a_call_that_ends_with_no_end_of_generation_is_refused(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(small_tokenizer, ENDS_CALLS.replace("<|call|>", "<|stop|>") + GENERATION)
    template = ChatTemplate(tokenizer)
    assert template.call_end == template.turn_end
    tokenizer = with_habit(small_tokenizer, "calls in a turn of their own")
    assert ChatTemplate(tokenizer).call_end.text == '"}<|im_end|>'


@pytest.mark.parametrize("kind", ["strings", "several turns", "system message", "white space", "other scripts"])
def test_an_end_that_only_the_next_turn_brings_is_written(kind: str, small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "ends a turn when the next one comes")
    end = ChatTemplate(tokenizer).turn_end
    assert (end.text, end.unwritten, end.trailing) == ("<|im_end|>", "<|im_end|>", 0)
    pair, plain = encode(tokenizer, row_of(kind)), encode(with_habit(small_tokenizer, "plain"), row_of(kind))
    assert isinstance(pair, EncodedPair)
    assert isinstance(plain, EncodedPair)
    assert pair.chosen_ids.tolist() == plain.chosen_ids.tolist()
    assert pair.prompt_ids.tolist() == plain.prompt_ids.tolist()


def test_the_next_role_ends_a_turn_if_generation_ends_there(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_template(small_tokenizer, BY_ROLE)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    user = tokenizer.get_vocab()["<|user|>"]
    end = ChatTemplate(tokenizer, eos_token_ids=(user,)).turn_end
    assert (end.token_id, end.text, end.unwritten) == (user, "<|user|>", "<|user|>")
    with pytest.raises(ModelError, match="ends the assistant's turn with no special token"):
        _ = ChatTemplate(tokenizer).turn_end


def test_a_turn_that_ends_inside_a_response_is_refused(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "calls in a turn of their own")
    error = encode(tokenizer, row_of("words and a tool call as the answer"))
    assert isinstance(error, RowError)
    assert "writes '<|im_end|>', the end of the turn, more than once in `chosen`" in str(error)
    row = row_of("strings") | {"chosen": "Say <|im_end|> twice: <|im_end|> so."}
    pair = encode(tokenizer, row, allow_control_tokens=True)  # the row's own words
    assert isinstance(pair, EncodedPair)
    assert str(tokenizer.decode(pair.chosen_ids)) == f"{row['chosen']}<|im_end|>"


def test_a_template_that_wants_tools_takes_rows_with_tools(small_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = with_habit(small_tokenizer, "wants tools")
    assert ChatTemplate(tokenizer).turn_end.text == "<|im_end|>"
    only = with_template(tokenizer, {"tool_use": HABITS["wants tools"]})
    for each in (tokenizer, only):
        assert isinstance(encode(each, row_of("tools")), EncodedPair)
        error = encode(each, row_of("strings"))
        assert isinstance(error, RowError)
        assert error.reason == "refused by the template"
        assert "\n" not in str(error)
