"""Turns preference pairs into token sequences, by the teacher's tokenizer and chat template.

The tokens of a prompt are the rendered conversation up to the assistant's text. The tokens of a response are those that
the rendered conversation with the response adds, up to and including the end-of-turn token. The prompt's tokens must be
a prefix of the tokens of the whole, and nothing that a row says may be missing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import numpy as np

from adpa.data.chat_template import THINKING_FIELDS, ChatTemplate
from adpa.data.preferences import PreferencePair, Row, parse_pair
from adpa.data.rendering import Rendered, Renderer
from adpa.data.round_trip import check_round_trip, find_losses, lost_bytes
from adpa.data.row_counts import RowCounts
from adpa.data.sequences import TokenIds, check_lengths
from adpa.data.vocabulary import token_ids
from adpa.errors import RowError

FIRST_ROWS = 1000  # whose texts are compared with their tokens
BATCH = 256
NO_IDS = np.array([], dtype=np.int32)


@dataclass(frozen=True)
class EncodedPair:
    """A preference pair as token ids, all int32 and one-dimensional; a prompt alone has empty responses."""

    example_id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds


@dataclass(frozen=True)
class Encoder:
    """Turns rows of preference data into token ids.

    Attributes:
        template: the teacher's chat template, with its tokenizer.
        max_prompt_length: most tokens of a prompt; the last ones are kept.
        max_length: most tokens of prompt and response together; the response is cut to the rest.
        drop_invalid: leave out a pair that cannot be used, and count it, instead of raising.
        rendered: prompts are rendered already.
        allow_control_tokens: take messages with control tokens in their text.
        prompts_alone: take rows without responses, if no row has any; they are prompts.
        counts: the counts so far.
    """

    template: ChatTemplate
    max_prompt_length: int
    max_length: int
    drop_invalid: bool = False
    rendered: bool = False
    allow_control_tokens: bool = False
    prompts_alone: bool = False
    counts: RowCounts = field(default_factory=RowCounts)

    def __post_init__(self) -> None:
        check_lengths(self.max_prompt_length, self.max_length)

    def encode(self, rows: Iterable[tuple[str, Row]]) -> Iterator[EncodedPair]:
        """Yields every (where, row) as token ids. A repeated pair gets its occurrence appended to its example id.

        Raises:
            RowError: rows cannot be used; after the last row, so that the message says how many and why.
            ModelError: the tokenizer does not keep text.
        """
        rendered = self._render(self._parse(rows))
        while batch := list(islice(rendered, BATCH)):
            for pair, encoded in self._tokenize(batch):
                occurrence = self.counts.add_used(pair.example_id, *encoded)
                example_id = pair.example_id if occurrence == 1 else f"{pair.example_id}:{occurrence}"
                yield EncodedPair(example_id, *encoded)
        if self.counts.dropped and not self.drop_invalid:
            raise self.counts.error()

    def _parse(self, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[int, PreferencePair]]:
        for number, (where, row) in enumerate(rows):
            self.counts.rows += 1
            try:
                yield number, parse_pair(where, row, self.rendered, self.prompts_alone)
            except RowError as error:
                self.counts.add_invalid(number, error)

    def _render(self, pairs: Iterator[tuple[int, PreferencePair]]) -> Iterator[tuple[int, PreferencePair, Rendered]]:
        first = list(islice(pairs, FIRST_ROWS))
        lost = check_round_trip(self.template.tokenizer, [text for _, pair in first for text in _texts(pair)])
        with_responses = any(pair.responses for _, pair in first)
        for number, pair in chain(first, pairs):
            try:
                if bool(pair.responses) != with_responses:
                    raise _unlike_others(pair)
                for text in _texts(pair) if lost else ():
                    if text in lost:
                        raise _lost(pair, lost[text])
                yield number, pair, self._renderer.render(pair)
            except RowError as error:
                self.counts.add_invalid(number, error)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.template, self.allow_control_tokens)

    def _tokenize(
        self, batch: Sequence[tuple[int, PreferencePair, Rendered]]
    ) -> Iterator[tuple[PreferencePair, tuple[TokenIds, TokenIds, TokenIds]]]:
        texts = [text for _, _, one in batch for text in (one.prompt, *one.wholes.values())]
        ids = iter(token_ids(self.template.tokenizer, texts))
        for number, pair, one in batch:
            prompt = np.array(next(ids), dtype=np.int32)
            wholes = {column: np.array(next(ids), dtype=np.int32) for column in one.wholes}
            try:
                responses = [self._response(pair, column, one, prompt, whole) for column, whole in wholes.items()]
                self._check_known(pair, list(one.wholes.values()) or [one.prompt], list(wholes.values()) or [prompt])
            except RowError as error:
                self.counts.add_invalid(number, error)
                continue
            self.counts.thinking_left_out += one.thinking_left_out
            self.counts.truncated_prompts += len(prompt) > self.max_prompt_length
            prompt = prompt[-self.max_prompt_length :]
            room = self.max_length - len(prompt)
            chosen_ids, rejected_ids = [response[:room] for response in responses] or (NO_IDS, NO_IDS)
            yield pair, (prompt, chosen_ids, rejected_ids)

    def _response(
        self, pair: PreferencePair, column: str, rendered: Rendered, prompt_ids: TokenIds, whole_ids: TokenIds
    ) -> TokenIds:
        if not np.array_equal(whole_ids[: len(prompt_ids)], prompt_ids):
            cause = "the tokenizer merges the end of the prompt with the response's beginning (white space, most often)"
            raise self._renderer.no_prefix(pair, column, pair.responses[column], rendered.prompt, cause)
        end = rendered.ends[column]
        response_ids = whole_ids[len(prompt_ids) : len(whole_ids) - end.trailing]
        if len(response_ids) == 0 or response_ids[-1] != end.token_id:
            raise RowError(
                f"{pair.where}: the tokens of `{column}` do not end with the end-of-turn token "
                f"{self.template.tokenizer.convert_ids_to_tokens(end.token_id)!r}",
                "use a template that ends every assistant's turn alike, or list the token at the end under "
                "eos_token_id in generation_config.json if it ends generation, or pass --drop-invalid",
                "no end of turn",
            )
        return response_ids

    @cached_property
    def _lost_bytes(self) -> bytes:
        return lost_bytes(self.template.tokenizer)

    def _check_known(self, pair: PreferencePair, texts: Sequence[str], whole_ids: Sequence[TokenIds]) -> None:
        """Checks that the vocabulary has tokens for all text."""
        tokenizer = self.template.tokenizer
        for text, ids in zip(texts, whole_ids, strict=True):
            unknown = 0 if tokenizer.unk_token_id is None else np.count_nonzero(ids == tokenizer.unk_token_id)
            if unknown > text.count(str(tokenizer.unk_token)):
                raise _lost(pair, "has no token for some of it")
            encoded = text.encode() if self._lost_bytes else b""
            if len(encoded.translate(None, self._lost_bytes)) < len(encoded) and find_losses(tokenizer, [text]):
                character = next(one for one in text if {*one.encode()} & {*self._lost_bytes})
                raise _lost(pair, f"has no token for {character!r}")


def _unlike_others(pair: PreferencePair) -> RowError:
    if pair.responses:
        problem = "the row has responses, but the first rows have none"
    else:
        problem = "the row has no `chosen` and no `rejected`, but other rows have them"
    return RowError(
        f"{pair.where}: {problem}",
        "keep pairs and prompts alone in files of their own, or pass --drop-invalid",
        "pairs and prompts mixed",
    )


def _lost(pair: PreferencePair, how: str) -> RowError:
    return RowError(
        f"{pair.where}: the tokenizer does not keep the text: it {how}",
        "change the text, or pass --drop-invalid",
        "text lost in tokens",
    )


def _texts(pair: PreferencePair) -> Iterator[str]:
    """The texts of a pair's messages, thinking included."""
    if isinstance(pair.prompt, str):
        yield pair.prompt
    for message in (*(() if isinstance(pair.prompt, str) else pair.prompt), *pair.responses.values()):
        yield from (message[name] for name in ("content", *THINKING_FIELDS) if message.get(name))
