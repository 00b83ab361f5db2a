"""One rank: ``torchrun … rank.py CALLS.json`` calls ``adpa.distill`` with each of the options in a file.

Beside the options of ``distill`` a call can have ``kill``, a rank and the micro-batch before which it kills itself,
``terminal``, the rank that has one, ``count_gathers``, a file for how often the step gathered a tensor of each size,
``idle``, whether the student has a parameter that gets no gradient, and ``count_columns``, whether its numbers change
with the padding. With ``command`` instead of other options it is the words of an ``adpa`` command, and the last.
``{rank}`` stands for the rank.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from adpa import cli, distill
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.training import run
from adpa.pipeline.training.student import attach_distill_head
from adpa.pipeline.training.trainer import DistillTrainer

torch.set_num_threads(1)
RANK = os.environ["RANK"]


class CountGathers(TorchDispatchMode):
    """Counts the gathers of sharded weights by their size."""

    def __init__(self) -> None:
        super().__init__()
        self.by_size: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in str(func):
            self.by_size[args[0].numel()] += 1
        return func(*args, **(kwargs or {}))


def attach_with_idle_parameter(model: PreTrainedModel) -> None:
    attach_distill_head(model)
    model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))


def load_with_count(*arguments: Any) -> PreTrainedModel:
    """A student that adds the number of columns, padding included, to its hidden states."""
    model = LOAD(*arguments)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state + 0.5 * output.last_hidden_state.shape[1]

    model.base_model.register_forward_hook(hook)
    return model


LOAD = Checkpoint.load
SHARDS = [False]  # whether the call at hand does


def call_cpus_gpus() -> None:
    """accelerate shards over GPUs only; over gloo it works as well, if the ranks are not known to be CPUs."""
    init = PartialState.__init__

    def renamed(self: PartialState, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        if SHARDS[0] and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed


def main() -> None:
    call_cpus_gpus()
    training_step = DistillTrainer.training_step
    for call in json.loads(Path(sys.argv[1]).read_text().replace("{rank}", RANK)):
        kill, gathers, steps = call.pop("kill", None), call.pop("count_gathers", None), 0
        has_terminal = call.pop("terminal", None) == int(RANK)
        sys.stderr.isatty = lambda: has_terminal  # type: ignore[method-assign]  # noqa: B023
        counter = CountGathers()
        SHARDS[0] = "fsdp=true" in call.get("set", [])
        attach = attach_with_idle_parameter if call.pop("idle", False) else attach_distill_head
        vars(run)["attach_distill_head"] = attach
        load = load_with_count if call.pop("count_columns", False) else LOAD
        Checkpoint.load = load  # type: ignore[method-assign, assignment]

        def step(self: DistillTrainer, *arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if [int(RANK), steps] == kill:  # noqa: B023
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            with counter:  # noqa: B023
                return training_step(self, *arguments, **options)

        DistillTrainer.training_step = step  # type: ignore[method-assign]
        if "command" in call:
            sys.argv[1:] = call["command"]
            cli.main()
        options: dict[str, Any] = call | {"cache": Path(call["cache"]), "output": Path(call["output"])}
        distill(**options)
        if gathers and RANK == "0":
            Path(gathers).write_text(json.dumps(counter.by_size))
    torch.distributed.destroy_process_group()


main()
