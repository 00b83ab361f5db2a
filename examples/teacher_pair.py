"""A teacher pair from a base model, with TRL: SFT makes the reference, DPO of the reference makes the teacher.

The data is a JSONL file with prompt, chosen and rejected, each a list of chat messages. The base model needs a chat
template that ends the assistant's turn with a special token. Install TRL, then run:

    pip install -c constraints.txt -e '.[lab]'
    python examples/teacher_pair.py --base org/large-base --data prefs.jsonl --reference models/sft --teacher models/dpo

A model that follows instructions already needs no SFT. Leave --base out, and name it as the reference:

    python examples/teacher_pair.py --reference org/large-instruct --data prefs.jsonl --teacher models/dpo

Then `adpa precompute --teacher models/dpo --reference models/sft …` takes the pair.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SETTINGS: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "bf16": torch.cuda.is_available()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="model to start from: a directory or a name on the Hub (default: no SFT)")
    parser.add_argument("--data", required=True, help="JSONL file of preference pairs")
    parser.add_argument(
        "--reference", required=True, help="directory for the model after SFT; or a model, without --base"
    )
    parser.add_argument("--teacher", required=True, help="directory for the model after DPO")
    parser.add_argument("--epochs", type=float, default=1, help="passes of each step over the data (default: 1)")
    parser.add_argument("--beta", type=float, default=0.1, help="β of DPO (default: 0.1)")
    arguments = parser.parse_args()

    pairs = load_dataset("json", data_files=arguments.data, split="train")
    if arguments.base is not None:
        train_reference(arguments.base, pairs, arguments.reference, arguments.epochs)
    train_teacher(arguments.reference, pairs, arguments.teacher, arguments.epochs, arguments.beta)


def train_reference(base: str, pairs: Dataset, output: str, epochs: float) -> None:
    """SFT on the chosen responses; the prompts do not count in the loss."""
    answers = pairs.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
    settings = SFTConfig(output_dir=output, num_train_epochs=epochs, **SETTINGS)
    trainer = SFTTrainer(base, args=settings, train_dataset=answers)
    trainer.train()
    trainer.save_model(output)


def train_teacher(reference: str, pairs: Dataset, output: str, epochs: float, beta: float) -> None:
    """DPO of the reference, against itself."""
    settings = DPOConfig(output_dir=output, num_train_epochs=epochs, beta=beta, **SETTINGS)
    trainer = DPOTrainer(reference, args=settings, train_dataset=pairs)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main()
