"""The first example of the data, as the models read it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adpa.data.chat_template import ChatTemplate
    from adpa.data.encoding import EncodedPair
    from adpa.data.sequences import TokenIds


@dataclass(frozen=True)
class FirstExample:
    """The first pair of the data as the models read it: text that was decoded from its tokens.

    Attributes:
        prompt: the prompt.
        chosen: the chosen response without its end-of-turn token; none if the data has prompts alone.
        end: the end-of-turn token; none if the response was cut.
        end_id: its id.
    """

    prompt: str
    chosen: str | None
    end: str | None
    end_id: int


def first_example(template: "ChatTemplate", pair: "EncodedPair") -> FirstExample:
    """The text of a pair, or of a prompt alone; of the latter, ``end`` is what will end a turn."""
    end_id, chosen_ids = template.turn_end.token_id, pair.chosen_ids
    ended = not chosen_ids.size or int(chosen_ids[-1]) in (end_id, template.call_end.token_id)
    if ended and chosen_ids.size:
        end_id, chosen_ids = int(chosen_ids[-1]), chosen_ids[:-1]

    def decode(ids: "TokenIds") -> str:
        return str(template.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return FirstExample(
        prompt=decode(pair.prompt_ids),
        chosen=decode(chosen_ids) if pair.chosen_ids.size else None,
        end=str(template.tokenizer.convert_ids_to_tokens(end_id)) if ended else None,
        end_id=end_id,
    )
