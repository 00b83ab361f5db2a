"""Prints the cost of scoring and training on GPUs as Markdown, from measured lengths and FLOP and assumed rates.

No GPU is needed. The command tokenizes preference pairs with SmolLM2's tokenizer and measures their lengths. It counts
FLOP while SmolLM2-135M's real weights score and learn a few pairs. ``benchmarks.cost_model`` turns both into hours.

    python -m benchmarks.costs --data preferences.jsonl
"""

import argparse
import inspect
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from benchmarks.cost_model import Assumptions, Pairs, Shape
from benchmarks.cost_tables import (
    PACKINGS,
    Flops,
    meanings,
    option,
    print_assumptions,
    print_cache,
    print_flops,
    print_lengths,
    print_scoring,
    print_shapes,
    print_sharing,
    print_totals,
    print_training,
)
from benchmarks.encoding import text_pairs
from benchmarks.scoring import quiet
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adpa import precompute
from adpa.data.batches import TrainingSequence, collate
from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.lab.smollm2 import save_smollm2
from adpa.pipeline.models.lm_head import hidden_states, read_head
from adpa.pipeline.training.student import attach_distill_head

FLOP_PAIRS, FLOP_LIMITS = 2, (64, 256)


def main() -> None:
    """Measures, then prints one table after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.costs")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    for name, default in asdict(Assumptions()).items():
        choices = PACKINGS if name == "packing" else None
        parser.add_argument(option(name), type=type(default), default=default, choices=choices, help=meanings()[name])
    arguments = vars(parser.parse_args())
    data: Path | None = arguments.pop("data")
    assumed = Assumptions(**arguments)
    quiet()
    rows = [json.loads(line) for line in data.read_text().splitlines()] if data else text_pairs(24)
    with tempfile.TemporaryDirectory() as folder:
        save_smollm2(Path(folder))
        # The counter sees the matrix products of "eager" attention, but not a CPU's fused kernel.
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    limits = inspect.signature(precompute).parameters
    lengths = [limits[name].default for name in ("max_prompt_length", "max_length")]
    template = ChatTemplate(tokenizer)
    numbered = [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    pairs = measure_pairs(Encoder(template, *lengths).encode(numbered))
    few = list(Encoder(template, *FLOP_LIMITS).encode(numbered[:FLOP_PAIRS]))
    print_lengths(pairs, assumed)
    print_flops(2 * len(few), count_flops(model, few), expected_flops(shape_of(model), few))
    print_shapes(pairs, assumed)
    print_assumptions(assumed)
    print_scoring(pairs, assumed)
    print_training(pairs, assumed)
    print_totals(pairs, assumed)
    print_sharing(pairs, assumed)
    print_cache(pairs, assumed)


def measure_pairs(encoded: Iterable[EncodedPair]) -> Pairs:
    """The lengths of prompts, chosen and rejected responses."""
    counts = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in encoded]
    return Pairs(*np.array(counts, np.int64).T)


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a Llama model."""
    config = model.config
    return Shape(
        type(model).__name__,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def count_flops(model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> Flops:
    """FLOP that torch's counter sees while a Llama with eager attention scores and learns a batch of these pairs.

    Counter and formula count matrix products alone. Training runs in bfloat16, because in float32 the head adds one
    product in place, which the counter misses.
    """
    attach_distill_head(model)
    batch = collate(
        [[TrainingSequence(number, text, None) for number, text in enumerate(texts(pair))] for pair in pairs]
    )
    none = torch.zeros(batch.pop("set_number").shape)
    with torch.no_grad():
        with FlopCounterMode(display=False) as decoder:
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        with FlopCounterMode(display=False) as head:
            read_head(model).float().logits(hidden.flatten(0, 1)[batch["predicts"]])
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as training:
        loss, _ = model(**batch, nll_weight=none + 1, kl_weight=none, advantage_weight=none)
        loss.backward()
    return Flops(*(counter.get_total_flops() for counter in (decoder, head, training)))


def texts(pair: EncodedPair) -> list[TokenSequence]:
    """The two sequences of a pair."""
    return [
        TokenSequence(sequence_key(pair.prompt_ids, ids), pair.prompt_ids, ids)
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]


def expected_flops(shape: Shape, pairs: Sequence[EncodedPair]) -> Flops:
    """FLOP of the same batch by the formula, padded to its longest sequence."""
    sequences = [text for pair in pairs for text in texts(pair)]
    longest = np.array([max(map(len, sequences))])
    decoder = len(sequences) * float(shape.decoder_flops(longest)[0])
    head = shape.head_flops(sum(len(text.response_ids) for text in sequences))
    return Flops(decoder, head, 3 * (decoder + head))


if __name__ == "__main__":
    main()
