"""Turns preference pairs into token sequences, by the teacher's tokenizer and chat template.

The tokens of a prompt are the rendered conversation up to the assistant's text. The tokens of a response are those that
the rendered conversation with the response adds, up to and including the end-of-turn token. The prompt's tokens must be
a prefix of the tokens of the whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from adpa.data.preferences import PreferencePair, parse_pair
from adpa.data.sequences import TokenIds, check_lengths
from adpa.data.vocabulary import TurnEnd, render
from adpa.errors import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPair:
    """A preference pair as token ids, all int32 and one-dimensional."""

    example_id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds


@dataclass
class EncodingCounts:
    """The numbers of prompts that were cut to the limit, and of pairs that were left out."""

    truncated_prompts: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns rows of preference data into token ids.

    Attributes:
        tokenizer: the teacher's, with its chat template.
        turn_end: ``find_turn_end(tokenizer)``.
        max_prompt_length: most tokens of a prompt; the last ones are kept.
        max_length: most tokens of prompt and response together; the response is cut to the rest.
        drop_invalid: leave out a pair that cannot be used, and count it, instead of raising.
        counts: the counts so far.
    """

    tokenizer: "PreTrainedTokenizerBase"
    turn_end: TurnEnd
    max_prompt_length: int
    max_length: int
    drop_invalid: bool = False
    counts: EncodingCounts = field(default_factory=EncodingCounts)

    def __post_init__(self) -> None:
        check_lengths(self.max_prompt_length, self.max_length)

    def encode(self, rows: Iterable[tuple[str, Mapping[str, Any] | RowError]]) -> Iterator[EncodedPair]:
        """Yields every (where, row) as token ids. A repeated pair gets its occurrence appended to its example id.

        Raises:
            DataError: a row is malformed, or the rendered prompt is not a prefix of the whole.
        """
        seen: dict[str, int] = {}
        pairs = self._parse(rows)
        while batch := list(islice(pairs, 256)):
            for pair, encoded in self._tokenize(batch):
                occurrence = seen[pair.example_id] = seen.get(pair.example_id, 0) + 1
                example_id = pair.example_id if occurrence == 1 else f"{pair.example_id}:{occurrence}"
                yield EncodedPair(example_id, *encoded)

    def _parse(
        self, rows: Iterable[tuple[str, Mapping[str, Any] | RowError]]
    ) -> Iterator[tuple[PreferencePair, list[str]]]:
        for where, row in rows:
            try:
                pair = parse_pair(where, row)
                yield pair, self._render(pair)
            except DataError:
                if not self.drop_invalid:
                    raise
                self.counts.dropped += 1

    def _render(self, pair: PreferencePair) -> list[str]:
        """The conversation three times: up to the response, with the chosen one, with the rejected one."""
        assert not isinstance(pair.prompt, str), "rendered prompts are not asked for"
        try:
            return [
                render(self.tokenizer, pair.prompt, add_generation_prompt=True),
                render(self.tokenizer, [*pair.prompt, pair.chosen]),
                render(self.tokenizer, [*pair.prompt, pair.rejected]),
            ]
        except TemplateError as error:
            raise DataError(f"{pair.where}: the teacher's chat template refuses the conversation: {error}") from error

    def _tokenize(
        self, batch: Sequence[tuple[PreferencePair, list[str]]]
    ) -> Iterator[tuple[PreferencePair, tuple[TokenIds, TokenIds, TokenIds]]]:
        texts = [text for _, rendered in batch for text in rendered]
        token_ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, (pair, _) in enumerate(batch):
            prompt, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in token_ids[3 * row : 3 * row + 3])
            try:
                chosen_ids = self._response(pair, "chosen", prompt, chosen)
                rejected_ids = self._response(pair, "rejected", prompt, rejected)
            except DataError:
                if not self.drop_invalid:
                    raise
                self.counts.dropped += 1
                continue
            self.counts.truncated_prompts += len(prompt) > self.max_prompt_length
            prompt = prompt[-self.max_prompt_length :]
            room = self.max_length - len(prompt)
            yield pair, (prompt, chosen_ids[:room], rejected_ids[:room])

    def _response(self, pair: PreferencePair, column: str, prompt_ids: TokenIds, whole_ids: TokenIds) -> TokenIds:
        if not np.array_equal(whole_ids[: len(prompt_ids)], prompt_ids):
            raise DataError(
                f"{pair.where}: the prompt's tokens are not a prefix of the tokens of prompt and `{column}`: the chat "
                "template changes the prompt when the response follows, or the tokenizer merges the end of the prompt "
                "with the beginning of the response (white space, most often)",
                "use a template that only appends, strip the response, or pass --drop-invalid",
            )
        response_ids = whole_ids[len(prompt_ids) : len(whole_ids) - self.turn_end.trailing]
        if len(response_ids) == 0 or response_ids[-1] != self.turn_end.token_id:
            raise DataError(
                f"{pair.where}: the tokens of `{column}` do not end with the end-of-turn token "
                f"{self.tokenizer.convert_ids_to_tokens(self.turn_end.token_id)!r}",
                "use a template that ends every assistant's turn alike, or pass --drop-invalid",
            )
        return response_ids
