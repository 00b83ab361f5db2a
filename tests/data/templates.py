"""Chat templates in the styles of common models, on SmolLM2's tokenizer."""

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
