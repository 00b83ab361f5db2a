"""The inputs of the GPU benchmark: models of published shapes with random weights, a tokenizer, and text pairs.

Random weights take as much time as trained ones. They are drawn on the device, with a deviation so large that the
output distributions are not flat.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.cost_model import STUDENTS, Shape
from benchmarks.gpu.part import Setting
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.rows import read_rows
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.lab.tokenizer import CHAT_TEMPLATE, PAD, TURN_END, TURN_START

SMALL, MEDIUM, LARGE = "0.5B", "1.5B", "7B"
TEACHER = "small teacher"  # for runs that only need its signals
SHAPES = {shape.name: shape for shape in STUDENTS} | {
    LARGE: Shape(LARGE, 28, 3584, 18944, 28, 4, 128, 152_064, qkv_bias=True),  # Qwen2.5 7B
    TEACHER: Shape(TEACHER, 2, 256, 512, 4, 2, 64, 151_936, tied=True, qkv_bias=True),
}
TOKENS = 4096
TINY = Shape("tiny", 2, 64, 64, 2, 1, 32, TOKENS + 64, tied=True, qkv_bias=True)
# Tokens of a prompt, a chosen and a rejected response: median and deviation of the logarithm (docs/scaling.md).
LENGTHS = ((234, 1.06), (314, 0.63), (345, 0.58))
CHARACTERS = 4  # of a token, on average
LIMITS, DRY_LIMITS = (1024, 2048), (16, 48)  # tokens of prompt and sequence; the first are precompute's defaults


def shape_of(setting: Setting, size: str) -> Shape:
    """The shape of a model. In a dry run all models are tiny."""
    return TINY if setting.dry else SHAPES[size]


def random_model(setting: Setting, size: str, seed: int = 0) -> PreTrainedModel:
    """A Qwen2 of this shape with random weights, on the device: bfloat16 on a GPU, float32 on a CPU."""
    shape = shape_of(setting, size)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(setting.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if setting.dry else torch.bfloat16
        )
    return model.eval()


def checkpoint(setting: Setting, size: str, seed: int = 0) -> Path:
    """A random model as a checkpoint directory, with the tokenizer. It is made once for all parts."""
    directory = setting.folder / f"{size}-{seed}".replace(" ", "-")
    if not directory.is_dir():
        unfinished = setting.folder / f"{directory.name}.unfinished"
        random_model(setting, size, seed).save_pretrained(unfinished, max_shard_size="2GB")
        text_tokenizer().save_pretrained(unfinished)
        unfinished.rename(directory)
    return directory


@cache
def text_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer trained on the repository's texts, with the laboratory's chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([repository_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
    )


@cache
def repository_text() -> str:
    """The repository's own texts."""
    root = Path(__file__).resolve().parents[2]
    paths = (root / "LICENSE", root / "README.md", *sorted(root.glob("docs/*.md")))
    return "\n".join(path.read_text() for path in paths)


def preferences(setting: Setting, count: int) -> Path:
    """A JSONL file of ``count`` preference pairs: the first ones of ``--data``, or pieces of the repository's texts."""
    path = setting.folder / f"{count}-pairs.jsonl"
    if not path.is_file():
        lines = setting.data.read_text().splitlines() if setting.data else map(json.dumps, text_pairs())
        path.write_text("".join(f"{line}\n" for line in islice(lines, count)))
    return path


def text_pairs() -> Iterator[dict[str, str]]:
    """Pairs made of pieces of the repository's texts, as long as the pairs of a real preference set."""
    text = repository_text()
    generator = np.random.default_rng(0)
    while True:
        pieces = []
        for median, deviation in LENGTHS:
            length = int(CHARACTERS * np.clip(generator.lognormal(math.log(median), deviation), 8, 2048))
            start = generator.integers(len(text) - length)
            pieces.append(text[start : start + length].strip())  # its white space would merge with the chat template's
        yield dict(zip(("prompt", "chosen", "rejected"), pieces, strict=True))


def limits(setting: Setting) -> dict[str, Any]:
    """The length limits for ``adpa.precompute``: its defaults, or small ones in a dry run."""
    return dict(zip(("max_prompt_length", "max_length"), DRY_LIMITS if setting.dry else LIMITS, strict=True))


def encoded_pairs(setting: Setting, count: int) -> list[EncodedPair]:
    """``count`` pairs as tokens."""
    tokenizer = text_tokenizer()
    encoder = Encoder(ChatTemplate(tokenizer), **limits(setting))
    return list(encoder.encode(read_rows(str(preferences(setting, count)))))


def sequences_of(pairs: list[EncodedPair]) -> list[TokenSequence]:
    """The two sequences of every pair."""
    return [
        TokenSequence(sequence_key(pair.prompt_ids, ids), pair.prompt_ids, ids)
        for pair in pairs
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
