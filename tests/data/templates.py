"""Chat templates in the styles of common models, and with the habits of real ones, on SmolLM2's tokenizer."""

from copy import deepcopy
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Style:
    """A chat template with its special tokens; ``end`` is the end-of-turn token, ``trailing`` what follows it."""

    template: str
    special_tokens: list[str]
    end: str
    trailing: int
    eos_token: str = "<|im_end|>"

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy of a tokenizer that speaks in this style."""
        styled = deepcopy(tokenizer)
        styled.add_tokens(self.special_tokens, special_tokens=True)
        styled.eos_token = self.eos_token
        styled.chat_template = self.template
        return styled


STYLES = {
    "llama-3": Style(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        end="<|eot_id|>",
        trailing=0,
    ),
    "gemma": Style(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        end="<end_of_turn>",
        trailing=1,
    ),
    "zephyr": Style(
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ["</s>"],
        end="</s>",
        trailing=1,
        eos_token="</s>",
    ),
    "phi-3": Style(
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "</s>"],
        end="<|end|>",
        trailing=2,
        eos_token="</s>",
    ),
}

TURN = "'<|im_start|>' + m['role'] + '\n' + {content} + '<|im_end|>\n'"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(content: str = "m['content']", before: str = "", skip: str = "false", generation: str = GENERATION) -> str:
    """ChatML with a habit: what it writes as content, what comes first, which messages it skips."""
    turn = TURN.replace("{content}", content)
    turns = f"{{% for m in messages %}}{{% if not ({skip}) %}}{{{{ {turn} }}}}{{% endif %}}{{% endfor %}}"
    return before + turns + generation


TOOL_CALL = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
# Thinking as in Qwen3: cut out of earlier turns, written in the last one, switched off by an empty one in the prompt.
# It ends in one line feed: this tokenizer would merge two of them with the answer.
QWEN_THINKING = (
    "{% for m in messages %}{% set text = m.content %}{% set thoughts = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n' }}{% endif %}"
    "{{ text.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)

# Ends a call with a token of its own; the first reads arguments as objects, the second as text and without content.
CALL = (
    "{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
)
ENDS_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    + CALL
    + "{{ '<|call|>' if m.tool_calls else '<|im_end|>\n' }}{% endfor %}"
)
CALLS_WITHOUT_CONTENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<tool_call>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
# Says the words in one turn and the call in the next one.
CALLS_IN_A_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content and m.tool_calls %}{{ m.content + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% elif m.content %}{{ m.content }}{% endif %}" + CALL + "{{ '<|im_end|>\n' }}{% endfor %}"
)

HABITS = {
    "plain": chatml(),
    "strips": chatml("m['content'] | trim"),
    "default system message": chatml(
        before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe <b>kind</b>.<|im_end|>\n' }}{% endif %}"
    ),
    "writes the date": chatml(before="{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"),
    "skips system messages": chatml(skip="m['role'] == 'system'"),
    "knows user and assistant": chatml(skip="m['role'] not in ['user', 'assistant']"),
    "keeps the last question": chatml(
        skip="m['role'] == 'user' and not loop.last and loop.index0 < messages | length - 2"
    ),
    "cuts thinking": chatml("m['content'].split('</think>')[-1]"),
    "cuts thinking of earlier turns": QWEN_THINKING,
    "opens thinking": chatml(generation=GENERATION.replace("assistant\n", "assistant\n<think>\n")),
    "opens thinking unless told": chatml(
        generation="{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking | default(true) %}{{ '<think>\n' }}{% endif %}{% endif %}"
    ),
    "two ends": chatml().replace("<|im_end|>\n", "<|end_response|><|im_end|>"),
    "two ends, one for assistants": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ '<|end_response|>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}" + GENERATION
    ),
    "counts the messages": chatml(before="{{ messages | length }}"),
    "tools": TOOLS + chatml("m['content']").replace("+ m['content']", "+ m['content'] }}" + TOOL_CALL + "{{ ''"),
    "raises": chatml(before="{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"),
    "undefined": chatml(before="{% if messages[0]['role'] == 'system' %}{{ messages[0].nothing.more }}{% endif %}"),
    "type error": chatml(before="{% if messages[0]['role'] == 'system' %}{{ tools | length }}{% endif %}"),
    "reads parts": chatml("m['content'][0]['text']"),
    "ends calls by a token of their own": TOOLS + ENDS_CALLS + GENERATION,
    "calls without content": TOOLS + CALLS_WITHOUT_CONTENT + GENERATION,
    "calls in a turn of their own": TOOLS + CALLS_IN_A_TURN + GENERATION,
    "ends a turn when the next one comes": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + GENERATION
    ),
    "closes thinking unless told": chatml(
        generation="{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if not enable_thinking %}{{ '<think>\n</think>\n' }}{% endif %}{% endif %}"
    ),
    "opens thinking and cuts it": chatml(
        "m['content'].split('</think>')[-1]", generation=GENERATION.replace("assistant\n", "assistant\n<think>\n")
    ),
    "wants tools": chatml(before="{% for t in tools %}{{ t | tojson }}{% endfor %}").replace(
        "m['content']", "m['content'] }}" + CALL + "{{ ''"
    ),
    "division by zero": chatml(before="{% if messages | length > 2 %}{{ 1 // 0 }}{% endif %}"),
}


def with_habit(tokenizer: PreTrainedTokenizerBase, habit: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with the template of a habit."""
    changed = deepcopy(tokenizer)
    changed.add_tokens(["<|end_response|>", "<|call|>"], special_tokens=True)
    changed.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    changed.chat_template = HABITS[habit]
    return changed
