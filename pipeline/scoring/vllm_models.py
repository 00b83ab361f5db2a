"""Models on vLLM: a decoder, a scorer and a sampler.

Requests are token ids. The next batch is queued while the engine works on the current one, so that the engine is never
idle. Each output becomes arrays of response rows as soon as it arrives. It must be about the requested tokens and must
have the expected number of rows.

Shapes: L tokens of a sequence, P of the prompt and T of the response; d hidden width, K ids.
"""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from vllm import EngineArgs, LLMEngine, PoolingParams, SamplingParams
from vllm.config import PoolerConfig
from vllm.exceptions import VLLMClientError, VLLMServerError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.sequences import TokenIds, TokenSequence
from adpa.errors import EngineError, ModelError, OptionError, first_line
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.devices import release_memory
from adpa.pipeline.scoring.sample import SharedSampler, stream_seed
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs

Item = TypeVar("Item")
Answer = TypeVar("Answer")

QUEUED_BATCHES = 2
SECONDS_TO_STOP = 30.0
MORE_MEMORY = (
    "give vLLM more memory (--gpu-memory-utilization, --tensor-parallel), or make it need less (--max-length, "
    "--quantization, --engine-arg max_num_batched_tokens=2048)"
)
# CUDA graphs speed up steps of few tokens; scoring has none. Code is compiled as before, and no number changes.
NO_GRAPHS = {"cudagraph_mode": "NONE"}
SMALLEST_TAIL = 1e-7  # float32 log-probabilities of the top K sum to at most 1 + this


class VllmModel:
    """A checkpoint of whole weights that runs on vLLM. vLLM has read its files when it is made.

    Raises:
        OptionError: vLLM has no such engine argument.
        ModelError: vLLM does not support the model.
        EngineError: vLLM does not start.
    """

    def __init__(self, checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
        self.name = checkpoint.name
        self._numbers = count()
        unknown = sorted(arguments.keys() - {field.name for field in fields(EngineArgs)})
        if unknown:
            raise OptionError(f"--engine-arg {unknown[0]}: vLLM has no such engine argument", "see its EngineArgs")
        assert checkpoint.adapter is None, "vLLM reads whole weights"
        _refuse_dense_layers(self.name, checkpoint.directory)
        with _starting(self.name):
            engine_args = EngineArgs(
                model=str(checkpoint.directory),
                skip_tokenizer_init=True,
                generation_config="vllm",
                # The files that are digested, and not those of Mistral's own format, which may lie beside them.
                config_format="hf",
                trust_remote_code=checkpoint.trust_remote_code,
                enable_prefix_caching=False,
                disable_log_stats=True,
                **{"load_format": "hf", **arguments},
            )
            before = set(multiprocessing.active_children())
            self._engine = LLMEngine.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
            _wake_when_it_dies(self._engine, set(multiprocessing.active_children()) - before)

    @property
    def v2_runner(self) -> bool:
        """Whether vLLM's V2 model runner runs the model."""
        return bool(self._engine.vllm_config.use_v2_model_runner)

    def answers(
        self,
        batches: Iterable[Sequence[Item]],
        ask: Callable[[Item], tuple[TokenIds, SamplingParams | PoolingParams]],
        read: Callable[[Item, Any], Answer],
    ) -> Iterator[list[Answer]]:
        """Yields the answers of each batch, in order. ``ask`` makes an item's request, ``read`` reads its output.

        Raises:
            EngineError: the engine failed.
        """
        open_requests: dict[str, Item] = {}
        answered: dict[str, Answer] = {}

        def submit(item: Item) -> str:
            request = str(next(self._numbers))
            token_ids, params = ask(item)
            self._engine.add_request(request, tokens_input(token_ids.tolist()), params)
            open_requests[request] = item
            return request

        def finish(requests: list[str]) -> list[Answer]:
            waiting = set(requests) - answered.keys()
            while waiting:
                self.check(self._engine.has_unfinished_requests(), "fewer answers than requests")
                for output in self._engine.step():
                    if output.finished:
                        answered[output.request_id] = read(open_requests.pop(output.request_id), output)
                        waiting.discard(output.request_id)
            return [answered.pop(request) for request in requests]

        queue: deque[list[str]] = deque()
        with _running(self.name):
            for batch in batches:
                queue.append([submit(item) for item in batch])
                if len(queue) == QUEUED_BATCHES:
                    yield finish(queue.popleft())
            while queue:
                yield finish(queue.popleft())

    def check(self, correct: bool, problem: str) -> None:
        """Checks an answer of the engine.

        Raises:
            EngineError: the answer is not correct; the message names the problem.
        """
        if not correct:
            raise EngineError(f"{self.name}: vLLM answered with {problem}", "report it, and use --engine hf meanwhile")

    def close(self) -> None:
        """Stops the engine and frees its memory."""
        self._engine.engine_core.shutdown(timeout=SECONDS_TO_STOP)
        del self._engine
        release_memory()


class VllmDecoder:
    """A ``Decoder`` on vLLM's pooling runner: hidden states after the final norm."""

    def __init__(self, checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
        self._model = VllmModel(
            checkpoint,
            {
                "runner": "pooling",
                "convert": "embed",
                "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
                "compilation_config": NO_GRAPHS,
                **_with_head_dtype(arguments, "model"),  # else vLLM converts the hidden states to float32
            },
        )

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """See ``Decoder.response_hidden``."""
        params = PoolingParams(task="token_embed", use_activation=False)

        def ask(sequence: TokenSequence) -> tuple[TokenIds, PoolingParams]:
            return _token_ids(sequence), params

        def read(sequence: TokenSequence, output: Any) -> Tensor:
            hidden_Ld: Tensor = output.outputs.data
            self._model.check(len(hidden_Ld) == len(sequence), "another number of hidden states than tokens")
            return hidden_Ld[len(sequence.prompt_ids) - 1 : -1].clone()

        return map(_join, self._model.answers(batches, ask, read))

    def close(self) -> None:
        """See ``Decoder.close``."""
        self._model.close()


class VllmLogprobsScorer:
    """A ``Scorer`` that uses vLLM's own prompt log-probabilities, for heads that adpa cannot run itself.

    The tail is 1 − Σp, at least ``SMALLEST_TAIL``: vLLM does not return the log-sum-exp over the other tokens.
    """

    def __init__(
        self, checkpoint: Checkpoint, arguments: dict[str, Any], head_dtype: str, top_k: int, with_reference: bool
    ) -> None:
        self._vocabulary = checkpoint.config.vocab_size
        self._model = VllmModel(
            checkpoint,
            {
                "runner": "generate",
                "max_logprobs": top_k + 1,
                "logprobs_mode": "raw_logprobs",
                "compilation_config": NO_GRAPHS,
                **_with_head_dtype(arguments, head_dtype),
            },
        )
        if with_reference and not self._model.v2_runner:
            self.close()
            raise OptionError(
                f"{checkpoint.name}: log-probabilities at requested ids need vLLM's V2 model runner, which is off here",
                "use a GPU, unset VLLM_USE_V2_MODEL_RUNNER, heed vLLM's own messages above, or use --engine hf",
            )

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        """See ``Scorer.top_k``."""
        params = SamplingParams(
            prompt_logprobs=top_k, flat_logprobs=True, detokenize=False, max_tokens=1, temperature=0.0
        )

        def ask(sequence: TokenSequence) -> tuple[TokenIds, SamplingParams]:
            return _token_ids(sequence), params

        def read(sequence: TokenSequence, output: Any) -> SignalRow:
            flat, rows = output.prompt_logprobs, slice(len(sequence.prompt_ids) - 1, None)
            self._model.check(flat is not None, "no log-probabilities")
            ids_TK = np.asarray(flat.token_ids, dtype=np.int32).reshape(-1, top_k + 1)[rows]
            logprobs_TK = np.asarray(flat.logprobs, dtype=np.float32).reshape(-1, top_k + 1)[rows]
            self._model.check(np.array_equal(ids_TK[:, 0], sequence.response_ids), "log-probabilities of other tokens")
            mass_T = np.exp(logprobs_TK[:, 1:], dtype=np.float64).sum(axis=1)
            tail_T = np.log(np.maximum(1 - mass_T, SMALLEST_TAIL)).astype(np.float32)
            if top_k == self._vocabulary:
                tail_T[:] = -np.inf
            return SignalRow(sequence.key, logprobs_TK[:, 0], ids_TK[:, 1:], logprobs_TK[:, 1:], tail_T)

        return self._model.answers(batches, ask, read)

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        """See ``Scorer.logprobs_at``."""

        def ask(request: tuple[TokenSequence, NDArray[np.int32]]) -> tuple[TokenIds, SamplingParams]:
            sequence, ids_TK = request
            if ids_TK.max() >= self._vocabulary:
                raise ModelError(
                    f"{self._model.name}: the teacher gives probability to the token id {ids_TK.max()}, which this "
                    f"model lacks: it has {self._vocabulary} tokens",
                    "use the reference that the teacher was made from",
                )
            return _token_ids(sequence), SamplingParams(
                prompt_logprob_token_ids=np.column_stack([sequence.response_ids, ids_TK]),
                prompt_logprob_start=len(sequence.prompt_ids) - 1,
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
            )

        def read(request: tuple[TokenSequence, NDArray[np.int32]], output: Any) -> ReferenceLogprobs:
            _, ids_TK = request
            logprobs_TK = np.asarray(output.prompt_token_id_logprobs, dtype=np.float32)
            expected = (len(ids_TK), ids_TK.shape[1] + 1)
            self._model.check(logprobs_TK.shape == expected, "another number of log-probabilities than ids")
            return logprobs_TK[:, 0], logprobs_TK[:, 1:]

        requests = (list(zip(*batch, strict=True)) for batch in zip(batches, topk_ids, strict=True))
        return self._model.answers(requests, ask, read)

    def close(self) -> None:
        """See ``Scorer.close``."""
        self._model.close()


class VllmSampler(SharedSampler):
    """A ``Sampler`` on vLLM. Every response has its own seed."""

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, arguments: dict[str, Any]) -> None:
        self._model = VllmModel(checkpoint, {"runner": "generate", **arguments})
        self._sampling = sampling

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """See ``Sampler.sample``."""
        sampling = self._sampling

        def ask(request: SampleRequest) -> tuple[TokenIds, SamplingParams]:
            return request.prompt_ids, SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=stream_seed(sampling, request, size=7),
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.ends),
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        def read(request: SampleRequest, output: Any) -> TokenIds:
            response_ids = np.asarray(output.outputs[0].token_ids, dtype=np.int32)
            ended = int(response_ids[-1]) in sampling.ends
            self._model.check(ended or len(response_ids) == sampling.max_new_tokens, "an unfinished response")
            return response_ids

        return self._model.answers(batches, ask, read)

    def close(self) -> None:
        """See ``Sampler.close``."""
        self._model.close()


def _refuse_dense_layers(name: str, directory: Path) -> None:
    """Refuses a model behind which vLLM would put layers of sentence-transformers, which are not the language model."""
    modules = directory / "modules.json"
    if modules.is_file() and "Dense" in modules.read_text():
        raise ModelError(f"{name}: vLLM would add the dense layers of modules.json to it", "remove modules.json")


def _wake_when_it_dies(engine: LLMEngine, processes: Collection[multiprocessing.process.BaseProcess]) -> None:
    """Raises an error from the engine if one of its processes dies. vLLM itself would wait forever."""
    answers = getattr(engine.engine_core, "outputs_queue", None)  # None if the engine runs in this process
    if answers is None or not processes:
        return

    def watch(sentinels: Sequence[int]) -> None:
        connection.wait(sentinels)
        answers.put(RuntimeError("a process of its engine died"))

    threading.Thread(target=watch, args=([each.sentinel for each in processes],), daemon=True).start()


def _join(rows: Sequence[Tensor]) -> Tensor:
    """The rows of a batch, [N, d]; with a GPU, in pinned memory, so that copies to it do not block."""
    joined_Nd = torch.empty(
        sum(map(len, rows)), rows[0].shape[1], dtype=rows[0].dtype, pin_memory=torch.cuda.is_available()
    )
    return torch.cat(list(rows), out=joined_Nd)


def _token_ids(sequence: TokenSequence) -> TokenIds:
    return np.concatenate([sequence.prompt_ids, sequence.response_ids])


def _with_head_dtype(arguments: dict[str, Any], head_dtype: str) -> dict[str, Any]:
    return arguments | {"hf_overrides": {**arguments.get("hf_overrides", {}), "head_dtype": head_dtype}}


class _Interrupted(BaseException):
    """Ctrl-C while vLLM starts. vLLM would catch a KeyboardInterrupt and keep waiting for its processes."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """Turns vLLM's errors at its start into errors of adpa."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _interrupt) if in_main_thread else None
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{name}: vLLM ran out of memory while it started", MORE_MEMORY) from error
    except (ValueError, TypeError, VLLMClientError, NotImplementedError) as error:
        reason = _reason(error)
        if "memory" in reason.lower():
            raise EngineError(f"{name}: vLLM does not start: {reason}", MORE_MEMORY) from error
        raise ModelError(f"{name}: vLLM cannot run it: {reason}", "use --engine hf, or another --engine-arg") from error
    except (RuntimeError, OSError, VLLMServerError) as error:
        raise EngineError(
            f"{name}: vLLM does not start ({_reason(error)}); its own messages above say why",
            f"if it is memory: {MORE_MEMORY}",
        ) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Turns vLLM's errors while it runs into errors of adpa."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{name}: vLLM ran out of memory; finished batches are kept", MORE_MEMORY) from error
    except (RuntimeError, VLLMServerError, VLLMClientError) as error:
        raise EngineError(
            f"{name}: vLLM failed ({_reason(error)}); finished batches are kept",
            "run the same command again to go on, with a lower --gpu-memory-utilization or --engine-arg "
            "max_num_batched_tokens=2048 if it ran out of memory",
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        error = Exception(error.errors()[0]["msg"])
    return first_line(error)[:300] or type(error).__name__
