"""Compares the time of scoring with the bare engine and with a loop like the paper's code: part of `make bench`.

    python -m benchmarks.scoring

SmolLM2-135M's real weights run on the CPU, in float32, with K = 50. The sequences are pieces of the repository's own
texts, half prompt and half response. Each method of scoring has its own process, which loads its models, warms up and
waits. The methods take turns, so that other work on the machine slows all of them. Only scoring is timed: not loading
a model, not its first batch, not unloading it. A ratio compares two times of the same round.

The bare engine is vLLM without log-probabilities: it reads the same tokens and generates one more. vLLM's
log-probabilities at requested ids are not measured: they need its V2 model runner, which runs on a CPU only in Triton's
interpreter.

The paper's loop does the same as `utils/precompute_logits.py` of the published code (github.com/SLIT-AI/ADPA, read in a
public copy), rewritten: transformers runs batches of two sequences, shortest first, padded to the longer one. It
computes the logits of every position, and also the loss, because labels are passed. For the response rows it takes the
softmax, the 50 largest values and the mass of the rest, as Python lists. It writes a line of JSON for each sequence, in
a file for each model. The published code then reads the lines back, copies them into an Arrow data set and merges
teacher and reference token by token; this benchmark leaves that out, in its favour. The published code computes in
float16 on a GPU; here all methods compute in float32.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.lab.smollm2 import save_smollm2
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.scoring.engine import Engine, HfEngine
from adpa.pipeline.scoring.jobs import make_batches
from adpa.pipeline.scoring.score import Scorer, score
from adpa.pipeline.scoring.vllm_engine import BATCH_TOKENS, VllmEngine
from adpa.pipeline.scoring.vllm_options import VllmOptions

TOP_K = 50
CPU = torch.device("cpu")
OPTIONS = VllmOptions(engine_arg=("enforce_eager=true", f"kv_cache_memory_bytes={256 << 20}", "use_tqdm_on_load=false"))
HF = HfEngine(CPU, "benchmark")
HIDDEN_STATES = VllmEngine(OPTIONS, CPU, None, True, "benchmark")
PROMPT_LOGPROBS = VllmEngine(OPTIONS, CPU, "float32", False, "benchmark")

# In process and without compilation, as in the tests.
VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

BARE, ONE_PASS, CACHED, PAPER = (
    "vllm, nothing scored",
    "vllm hidden-states, teacher",
    "vllm hidden-states, end to end",
    "the paper's loop, end to end",
)
MOST_TIME, LEAST_SPEED = 1.45, 3.0


@dataclass(frozen=True)
class Task:
    """The input of every method of scoring."""

    teacher: Checkpoint
    reference: Checkpoint
    sequences: list[TokenSequence]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    @property
    def response_tokens(self) -> int:
        """Response tokens of all sequences."""
        return sum(len(sequence.response_ids) for sequence in self.sequences)

    def scoring(self, engine: Engine) -> Scoring:
        """The scoring of both models."""
        return Scoring(self.teacher.identity, self.reference.identity, "", TOP_K, "float32", engine.name)


@dataclass(frozen=True)
class Measured:
    """One turn: seconds of scoring, and bytes written."""

    seconds: float
    size: int = 0


Run = Callable[[Sequence[TokenSequence]], Measured]


def main() -> None:
    """Measures round by round and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.scoring")
    parser.add_argument("--sequences", type=int, default=24, help="number of scored sequences")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    arguments = parser.parse_args()
    quiet()
    os.environ.update(VLLM)
    with tempfile.TemporaryDirectory() as folder:
        teacher, reference = Path(folder, "teacher"), Path(folder, "reference")
        save_smollm2(teacher)
        save_perturbed(teacher, reference)
        sequences = text_sequences(teacher, arguments.sequences)
        task = Task(open_checkpoint(str(teacher)), open_checkpoint(str(reference)), sequences)
        print_table(task, measure(task, arguments.rounds))


def quiet() -> None:
    """Turns off transformers' progress bars and load reports."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def save_perturbed(source: Path, directory: Path) -> None:
    """Saves a copy of a checkpoint with slightly different weights: a reference as expensive as the teacher."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.01 * torch.randn_like(weight))
    model.save_pretrained(directory)


def text_sequences(tokenizer: Path, count: int) -> list[TokenSequence]:
    """Pieces of the repository's texts, with about 150 tokens of prompt and of response; some are much longer."""
    root = Path(__file__).resolve().parents[1]
    text = "\n".join(path.read_text() for path in (root / "LICENSE", root / "README.md", root / "docs/smollm2.md"))
    ids = np.array(AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"], dtype=np.int32)
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(count):
        prompt, response = np.clip(generator.lognormal(4.87, 0.5, 2), 16, 480).astype(int)
        start = generator.integers(len(ids) - prompt - response)
        prompt_ids, response_ids = ids[start : start + prompt], ids[start + prompt : start + prompt + response]
        sequences.append(TokenSequence(sequence_key(prompt_ids, response_ids), prompt_ids, response_ids))
    return sequences


def measure(task: Task, rounds: int) -> dict[str, list[Measured]]:
    """Runs every method once in every round."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name in METHODS:  # one after the other: loading would disturb a warm-up
        pipes[name], end = spawn.Pipe()
        spawn.Process(target=serve, args=(end, name, task), daemon=True).start()
        pipes[name].recv()
    measured: dict[str, list[Measured]] = {name: [] for name in METHODS}
    for number in range(1, rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            measured[name].append(pipe.recv())
            print(f"round {number}: {name}: {measured[name][-1].seconds:.1f} s", file=sys.stderr)
    for pipe in pipes.values():
        pipe.send(False)
    return measured


def serve(pipe: Connection, name: str, task: Task) -> None:
    """Runs one method in its own process: loads its models, warms up, and scores at each request."""
    quiet()
    run = METHODS[name](task)
    run(task.sequences[:4])
    pipe.send("ready")
    while pipe.recv():
        pipe.send(run(task.sequences))


def batch_tokens(engine: Engine) -> int:
    """The engine's default; less for hf, because its 8,192 would pad this small set far more than a large one."""
    return 1024 if engine is HF else BATCH_TOKENS


def bare(task: Task) -> Run:
    """vLLM reads the sequences and generates a token for each, without log-probabilities."""
    from vllm import SamplingParams

    from adpa.pipeline.scoring.vllm_models import VllmModel

    arguments = {"dtype": "float32", "max_model_len": task.longest + 1, **OPTIONS.arguments("teacher")}
    model = VllmModel(task.teacher, {"runner": "generate", **arguments})
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def ask(sequence: TokenSequence) -> tuple[NDArray[np.int32], SamplingParams]:
        return np.concatenate([sequence.prompt_ids, sequence.response_ids]), params

    def run(sequences: Sequence[TokenSequence]) -> Measured:
        started = time.perf_counter()
        batches = make_batches(sequences, len, batch_tokens(HIDDEN_STATES))
        for _ in model.answers(batches, ask, lambda _sequence, _output: None):
            pass
        return Measured(time.perf_counter() - started)

    return run


def teacher(task: Task, engine: Engine) -> Run:
    """The teacher's pass alone."""
    scorer = engine.open_scorer(task.teacher, task.scoring(engine), task.longest)

    def run(sequences: Sequence[TokenSequence]) -> Measured:
        started = time.perf_counter()
        for _ in scorer.top_k(make_batches(sequences, len, batch_tokens(engine)), TOP_K):
            pass
        return Measured(time.perf_counter() - started)

    return run


def reference(task: Task, engine: Engine) -> Run:
    """The reference's pass alone, at random ids, which cost as much as the teacher's."""
    scorer = engine.open_scorer(task.reference, task.scoring(engine), task.longest)
    generator = np.random.default_rng(0)

    def run(sequences: Sequence[TokenSequence]) -> Measured:
        batches = make_batches(sequences, len, batch_tokens(engine))
        size = task.teacher.config.vocab_size
        ids = [
            [generator.integers(0, size, (len(sequence.response_ids), TOP_K), dtype=np.int32) for sequence in batch]
            for batch in batches
        ]
        started = time.perf_counter()
        for _ in scorer.logprobs_at(batches, ids):
            pass
        return Measured(time.perf_counter() - started)

    return run


def end_to_end(task: Task, engine: Engine) -> Run:
    """Both models, one after the other, into a cache on disk, as in ``adpa precompute``."""
    scoring = task.scoring(engine)
    checkpoints = {checkpoint.identity: checkpoint for checkpoint in (task.teacher, task.reference)}

    def run(sequences: Sequence[TokenSequence]) -> Measured:
        excluded = 0.0

        @contextmanager
        def not_timed() -> Iterator[None]:
            nonlocal excluded
            started = time.perf_counter()
            yield
            excluded += time.perf_counter() - started

        def open_scorer(identity: ModelIdentity) -> Scorer:
            with not_timed():
                scorer = engine.open_scorer(checkpoints[identity], scoring, task.longest)
                list(scorer.top_k([task.sequences[:4]], TOP_K))
            scorer.close = not_timed()(scorer.close)  # type: ignore[method-assign]
            return scorer

        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            score(Path(folder), scoring, sequences, open_scorer, batch_tokens(engine))
            seconds = time.perf_counter() - started - excluded
            return Measured(seconds, sum(path.stat().st_size for path in scoring.folder(Path(folder)).glob("*.arrow")))

    return run


def paper_loop(task: Task) -> Run:
    """Both models, one after the other, as in the paper's code."""
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
        for checkpoint in (task.teacher, task.reference)
    ]

    def run(sequences: Sequence[TokenSequence]) -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in ("teacher.jsonl", "reference.jsonl")]
            started = time.perf_counter()
            for model, path in zip(models, paths, strict=True):
                write_json_lines(model, sequences, path)
            return Measured(time.perf_counter() - started, sum(path.stat().st_size for path in paths))

    return run


@torch.no_grad()
def write_json_lines(model: torch.nn.Module, sequences: Sequence[TokenSequence], path: Path) -> None:
    """The paper's loop for one model."""
    ordered = sorted(sequences, key=len)
    with path.open("w") as file:
        for start in range(0, len(ordered), 2):
            batch = ordered[start : start + 2]
            longest = max(map(len, batch))
            input_ids, attention_mask, labels = [], [], []
            for sequence in batch:
                prompt, response = sequence.prompt_ids.tolist(), sequence.response_ids.tolist()
                padding = longest - len(sequence)
                input_ids.append(prompt + response + [0] * padding)
                attention_mask.append([1] * len(sequence) + [0] * padding)
                labels.append([-100] * len(prompt) + response + [-100] * padding)
            labels_BL = torch.tensor(labels)
            output = model(
                input_ids=torch.tensor(input_ids),
                attention_mask=torch.tensor(attention_mask),
                labels=labels_BL,
                use_cache=False,
            )
            logits_BLV, labels_BL = output.logits[:, :-1].contiguous(), labels_BL[:, 1:].contiguous()
            for row, (logits_LV, labels_L) in enumerate(zip(logits_BLV, labels_BL, strict=True)):
                scored = labels_L != -100
                largest = logits_LV[scored].softmax(dim=-1).topk(TOP_K, dim=-1)
                rest_T = 1 - largest.values.sum(dim=-1)
                tokens = [
                    {"indices": ids.tolist(), "values": values.tolist(), "remaining_probs_sum": rest.item()}
                    for ids, values, rest in zip(largest.indices, largest.values, rest_T, strict=True)
                ]
                line = {"index": start + row, "compressed_probs": tokens, "labels": labels_L[scored].tolist()}
                file.write(json.dumps(line) + "\n")


METHODS: dict[str, Callable[[Task], Run]] = {
    BARE: bare,
    "vllm prompt-logprobs, teacher": partial(teacher, engine=PROMPT_LOGPROBS),
    ONE_PASS: partial(teacher, engine=HIDDEN_STATES),
    "vllm hidden-states, reference": partial(reference, engine=HIDDEN_STATES),
    "hf, teacher": partial(teacher, engine=HF),
    CACHED: partial(end_to_end, engine=HIDDEN_STATES),
    "hf, end to end": partial(end_to_end, engine=HF),
    PAPER: paper_loop,
}


def print_table(task: Task, measured: dict[str, list[Measured]]) -> None:
    """Prints the measurements, and whether the goals are met."""
    print(
        f"{len(task.sequences)} sequences, {task.tokens:,} tokens, of which {task.response_tokens:,} are responses; "
        f"K = {TOP_K}, float32, {torch.get_num_threads()} threads; "
        f"median (least to most) of {len(measured[BARE])} rounds"
    )
    table = Table("", "models", "tokens/s", "time, bare = 1", "speed, paper's loop = 1", "bytes/response token")
    for name, turns in measured.items():
        end_to_end = turns[0].size > 0
        table.add_row(
            name,
            "2" if end_to_end else "1",
            summary([task.tokens / turn.seconds for turn in turns], ",.0f"),
            summary(ratios(turns, measured[BARE]), ".2f"),
            summary(ratios(measured[PAPER], turns), ".2f") if end_to_end else "",
            f"{turns[0].size / task.response_tokens:,.0f}" if end_to_end else "",
        )
    Console(width=140).print(table)
    time_of_bare = statistics.median(ratios(measured[ONE_PASS], measured[BARE]))
    met = "met" if time_of_bare <= MOST_TIME else "missed"
    print(f"one pass: {time_of_bare:.2f} times the time of the bare engine; goal, at most {MOST_TIME}: {met}")
    speed = statistics.median(ratios(measured[PAPER], measured[CACHED]))
    met = "met" if speed >= LEAST_SPEED else "missed"
    print(f"end to end: {speed:.2f} times as fast as the paper's loop; goal, at least {LEAST_SPEED}: {met}")


def ratios(turns: Sequence[Measured], others: Sequence[Measured]) -> list[float]:
    """Ratios of the times, round by round."""
    return [turn.seconds / other.seconds for turn, other in zip(turns, others, strict=True)]


def summary(values: Sequence[float], form: str) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
