"""Checkpoints: turns the name that a user types into a directory, an identity and a loaded model."""

import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adpa.data.cache.signals import ModelIdentity
from adpa.data.vocabulary import load_tokenizer
from adpa.errors import HeadError, ModelError, first_line
from adpa.pipeline.models import adapters
from adpa.pipeline.models.lm_head import LmHead, check_head, read_head
from adpa.pipeline.models.model_names import find_base, find_directory, is_adapter
from adpa.pipeline.models.remote_code import check_own_code, code_files
from adpa.pipeline.models.weight_files import (
    CONFIG,
    check_whole,
    digest_files,
    digest_lines,
    is_quantized,
    model_files,
    read_json,
    weight_files,
)
from adpa.pipeline.options import DtypeName

GENERATION_CONFIG = "generation_config.json"
# What damaged files raise, and a quantization whose package is missing or that does not fit to the weights.
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError)
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError),
    *(ImportError, AssertionError),
)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory and the name that the user typed.

    Attributes:
        name: the name that the user typed.
        revision: the commit on the Hub; None for a local directory.
        directory: the directory of whole weights; of an adapter, that of its base.
        adapter: the directory of the adapter that is merged into these weights; None if the model is none.
        attn_implementation: what computes the attention in transformers; None: what transformers chooses.
        trust_remote_code: whether Python code beside the weights, or beside the tokenizer, is run.
    """

    name: str
    revision: str | None
    directory: Path
    adapter: Path | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the expensive digest, not the cheap config and tokenizer."""
        return {name: value for name, value in vars(self).items() if name not in ("config", "tokenizer")}

    @cached_property
    def identity(self) -> ModelIdentity:
        """Name, revision, and the digest of all that is loaded; reads all of its bytes, once per process.

        That is configuration and weights, and code if it is run; of an adapter, also those of its base.
        """
        code = code_files(self.name, self.directory) if self.trust_remote_code else []
        digest = digest_lines(digest_files([*model_files(self.name, self.directory), *code]))
        if self.adapter is not None:
            digest = adapters.digest_adapter(self.name, self.adapter, digest)
        return ModelIdentity(self.name, self.revision, digest)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model in the checkpoint."""
        return self._read_config()[1]

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end generation, in the order of generation_config.json or, without it, of config.json.

        Ids that the model has no token for are left out: it never says them.

        Raises:
            ModelError: generation_config.json cannot be read, or an id is no whole number.
        """
        settings = self._directory_of(GENERATION_CONFIG) / GENERATION_CONFIG
        if settings.is_file():
            ids = read_json(self.name, settings).get("eos_token_id")
        else:
            ids = getattr(self.config, "eos_token_id", None)
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if strange := [one for one in ids if type(one) is not int]:
            raise ModelError(
                f"{self.name}: found {strange[0]!r} in its eos_token_id; expected token ids",
                f"correct {GENERATION_CONFIG}, or without it config.json",
            )
        return tuple(one for one in dict.fromkeys(ids) if 0 <= one < self.config.vocab_size)

    @property
    def is_multimodal(self) -> bool:
        """Whether the language model is part of a larger model."""
        whole, text = self._read_config()
        return whole is not text

    @property
    def is_quantized(self) -> bool:
        """Whether weights on disk are quantized: all of them, or some."""
        return is_quantized(self.name, self.directory)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights; of an adapter, its own, or else the base's."""
        return load_tokenizer(self._directory_of(*TOKENIZER_FILES), self.trust_remote_code)

    def dtype_name(self, dtype: DtypeName) -> str:
        """The dtype to compute in; ``auto`` is the checkpoint's own."""
        if dtype != "auto":
            return dtype
        own = self.config.dtype or torch.float32
        if not isinstance(own, torch.dtype):
            raise ModelError(f"{self.name}: found dtype {own!r} in its config.json; expected a dtype such as bfloat16")
        return str(own).removeprefix("torch.")

    def load(self, dtype: str, device: torch.device, **options: Any) -> PreTrainedModel:
        """Loads the model; ``options`` are further options of ``from_pretrained``. An adapter is merged in the dtype.

        Raises:
            ModelError: transformers cannot load it, or its weights do not match the configuration or the base.
        """
        # cuDNN's attention makes a plan for each new shape, and our shapes change with every batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._read_config()  # raises clearer errors
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        model, unexpected = self._load(dtype, **options)
        self._refuse_keys("unexpected_keys", unexpected)
        if self.adapter is not None:
            model = adapters.merge(self.name, model, self.adapter)
            model.name_or_path = str(self.adapter)  # new adapters on it must not take the base for theirs
        model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to without its overloads
        return model

    def without_weights(self, dtype: str) -> PreTrainedModel:
        """The model on the meta device: its layers and their sizes, and no numbers.

        Raises:
            ModelError: transformers cannot make it.
        """
        config, _ = self._read_config()
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config,
                    dtype=getattr(torch, dtype),
                    attn_implementation=self.attn_implementation,
                    trust_remote_code=self.trust_remote_code,
                )
        except self._errors(*LOADING_ERRORS) as error:
            self._refuse_remote_code(error)
            raise ModelError(f"{self.name}: transformers cannot make it: {first_line(error)}") from error
        return model

    def load_head(self, dtype: str, device: torch.device) -> LmHead:
        """Loads the head alone: it loads the model without its layers, whose weights stay on disk.

        The head is checked in float32. Its numbers are those of the whole model loaded in ``dtype``.

        Raises:
            HeadError: the head is not one that adpa knows, or its weights are quantized.
            ModelError: the checkpoint is not complete.
        """
        assert self.adapter is None, "the head of an adapter is that of its merged weights"
        config, text_config = self._read_config()
        if text_config is not config:
            raise HeadError(f"{self.name}: it is more than a language model")
        config.num_hidden_layers = 0
        if getattr(config, "layer_types", None) is not None:
            with suppress(AttributeError):  # some configurations derive it from the number of layers
                config.layer_types = []
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would list the weights of all layers as unexpected
        try:
            model, unexpected = self._load("float32", config=config)
            model.eval()
            check_head(model)
            head = read_head(model)
            # Quantized weights have their scales beside them; transformers would ignore the scales here.
            modules = {
                name.rpartition(".")[0]
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter is head.weight
            }
            self._refuse_keys("unexpected_keys", [key for key in unexpected if key.rpartition(".")[0] in modules])
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise HeadError(f"{self.name}: it does not run without its layers: {first_line(error)}") from error
        except ModelError as error:
            if self.is_quantized or self.trust_remote_code:
                raise HeadError(error.args[0]) from error
            raise
        finally:
            transformers.logging.set_verbosity(verbosity)
        return head.to(device, getattr(torch, dtype))

    def _read_config(self) -> tuple[PretrainedConfig, PretrainedConfig]:
        """The configurations of the whole model and of its language model, which may be the same object."""
        try:
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
            text_config = config.get_text_config(decoder=True)
            if self.adapter is not None:
                rows = adapters.embedding_rows(self.name, self.adapter)
                text_config.vocab_size = max(rows.values(), default=text_config.vocab_size)
            return config, text_config
        except ModelError:
            raise
        except StrictDataclassError as error:  # its cause says what is wrong, in one line
            line = first_line(error.__cause__ or error)
            raise ModelError(f"{self.name}: its config.json cannot be read: {line}") from error
        except self._errors(*CONFIG_ERRORS) as error:
            self._refuse_remote_code(error)
            raise ModelError(f"{self.name}: its config.json cannot be read: {first_line(error)}") from error

    def _load(self, dtype: str, **options: Any) -> tuple[PreTrainedModel, Sequence[str]]:
        """The model, and the names of the weights on disk that it has no parameter for."""
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.directory,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        except self._errors(*LOADING_ERRORS) as error:
            self._refuse_remote_code(error)
            reason = first_line(error) or type(error).__name__
            attention = options.get("attn_implementation")
            how = f" with --attn-implementation {attention}" if attention else ""
            raise ModelError(f"{self.name}: transformers cannot load it{how}: {reason}") from error
        model: PreTrainedModel
        model, information = loaded
        if self.trust_remote_code:
            check_own_code(self.name, self.directory, model)
        # transformers fills missing weights with random numbers and only warns.
        for problem in ("missing_keys", "mismatched_keys"):
            self._refuse_keys(problem, information[problem])
        return model, list(information["unexpected_keys"])

    def _errors(self, *known: type[Exception]) -> tuple[type[Exception], ...]:
        """What loading may raise: known errors, or with code of the repository any."""
        return (Exception,) if self.trust_remote_code else known

    def _refuse_remote_code(self, error: Exception) -> None:
        """Says in one line that an error of transformers is about code in the directory."""
        if "trust_remote_code" in str(error) and not self.trust_remote_code:
            architectures = read_json(self.name, self.directory / CONFIG).get("architectures")
            architecture = architectures[0] if isinstance(architectures, list) and architectures else "it"
            raise ModelError(
                f"{self.name}: {architecture} needs code from its repository, which can do all that you can",
                "read it, then add --trust-remote-code",
            ) from error

    def _directory_of(self, *names: str) -> Path:
        """The adapter's directory if one of these files lies there, else that of the weights."""
        own = self.adapter is not None and any((self.adapter / each).is_file() for each in names)
        return self.adapter if self.adapter is not None and own else self.directory

    def _refuse_keys(self, problem: str, keys: Iterable[object]) -> None:
        if names := sorted(map(str, keys)):
            raise ModelError(
                f"{self.name}: its weights have {len(names)} {problem.replace('_', ' ')}, the first {names[0]}",
                "save the checkpoint again as a causal language model",
            )

    def weight_bytes(self, dtype: str) -> int:
        """About how many bytes the weights take in a dtype; for quantized weights, their size on disk."""
        size = sum(path.stat().st_size for path in weight_files(self.name, self.directory))
        if self.is_quantized:
            return size
        return size * getattr(torch, dtype).itemsize // getattr(torch, self.dtype_name("auto")).itemsize

    def check_memory(self, dtype: str, room: int, advice: str) -> None:
        """Checks, by the size on disk, that the weights fit into ``room`` bytes in a dtype.

        Raises:
            ModelError: they do not; ``advice`` is its fix.
        """
        needed = self.weight_bytes(dtype)
        if needed > room:
            raise ModelError(
                f"{self.name}: its weights take about {needed / 1e9:.1f} GB in {dtype}; there is room for "
                f"{room / 1e9:.1f} GB",
                advice,
            )

    def check_here(self) -> None:
        """Checks that this machine has the directory of the checkpoint, which another machine may have opened.

        Raises:
            ModelError: it has not.
        """
        for directory in (self.directory, self.adapter):
            if directory is not None and not directory.is_dir():
                raise ModelError(
                    f"{self.name}: {platform.node()} has no {directory}",
                    "use a directory that every machine sees; for models of the Hub, set HF_HOME to one",
                )

    def check_ids(self, largest: int) -> None:
        """Checks that the model has an embedding for every token id up to the largest.

        Raises:
            ModelError: it has not.
        """
        if largest >= self.config.vocab_size:
            raise ModelError(
                f"{self.name}: the data has the token id {largest}; the model has {self.config.vocab_size} embeddings",
                "use the model that belongs to this tokenizer",
            )

    def check_positions(self, lengths: Sequence[int]) -> None:
        """Checks that the model has a position for every token of sequences of these lengths.

        Raises:
            ModelError: it has not.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        if (getattr(self.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            # With a longer sequence in the batch, LongRoPE changes the frequencies of all positions.
            limit = self.config.rope_parameters.get("original_max_position_embeddings", limit)
        longer = [length for length in lengths if limit is not None and length > limit]
        if longer:
            raise ModelError(
                f"{self.name}: {len(longer)} of {len(lengths)} sequences need more positions, up to {max(longer)}, "
                f"than the model has, {limit}",
                "lower --max-length, --max-prompt-length or --max-new-tokens",
            )


def open_checkpoint(
    name: str, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Finds a checkpoint: a local directory, or ``org/name`` or ``org/name@revision`` on the Hub.

    The directory has whole weights, or an adapter of PEFT, whose base is found by the name in adapter_config.json.

    Args:
        name: the name.
        attn_implementation: see ``Checkpoint``.
        trust_remote_code: see ``Checkpoint``.

    Raises:
        ModelError: the checkpoint does not exist, is not complete, or does not say without doubt what is loaded.
    """
    directory, revision = find_directory(name, trust_remote_code)
    adapter = directory if is_adapter(name, directory) else None
    if adapter is None:
        check_whole(name, directory)
    else:
        adapters.check_adapter(name, adapter)
        directory = find_base(name, adapter, trust_remote_code)
    return Checkpoint(name, revision, directory, adapter, attn_implementation, trust_remote_code)
