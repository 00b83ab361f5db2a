"""Estimates the memory of a training step from the configuration of a student; no weight is loaded.

The forward pass runs on fake tensors, which have shapes and no numbers. Autograd says what it keeps of each of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from adpa.kernels import torch_head, triton_head
from adpa.pipeline.models.attention import SDPA
from adpa.pipeline.models.attention_mask import WITHOUT_PADDING
from adpa.pipeline.models.devices import device_memory
from adpa.pipeline.models.lm_head import hidden_states, read_head
from adpa.pipeline.training.distill_plan import MemoryEstimate
from adpa.pipeline.training.model_sharding import sharding_name
from adpa.pipeline.training.run import Run

# Bytes of a weight in NF4 with double quantization: 4 bits, and its share of 8 bits for each block of 64 weights and of
# 32 bits for 256 such blocks (QLoRA, section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
ADAM_STATES = 2  # numbers for each trained one: of an optimizer that cannot be tried
FOLLOWED = 4  # layers: neighbours may differ, such as those with a sliding window
TRIAL_WIDTH = 256  # of the layer on which an optimizer is tried: large enough for states of 8 bits
SHARDED = {"FSDP2": 3, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}  # optimizer, then gradients, then weights


class FakeStudent:
    """A student without numbers, with the sizes of a real one.

    Args:
        model: the student on the meta device.
        device: the device of training.
        add_adapters: adds adapters to a model; None to train all weights.

    Attributes:
        model: the student.
        parameters: its parameters, tied ones once.
        trained_parameters: those that are trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        add_adapters: Callable[[PreTrainedModel], nn.Module] | None = None,
    ) -> None:
        if model.config._attn_implementation == SDPA:
            model.set_attn_implementation(WITHOUT_PADDING)
        self._device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._trained: nn.Module = model if add_adapters is None else add_adapters(model)
        self.model = model
        self.parameters = list(self._trained.parameters())
        self.trained_parameters = [each for each in self.parameters if each.requires_grad]

    def activation_bytes(self, sequences: int, length: int, arguments: TrainingArguments) -> int | None:
        """Bytes that a forward pass keeps for the backward pass; None if it needs numbers, not only shapes.

        With gradient checkpointing these are the inputs of the layers, and all of one layer, which is computed again.
        The model loses most of its layers: the first four stand for all, so that this takes no time.
        """
        number = self.model.config.get_text_config().num_hidden_layers
        lists = (each for each in self.model.modules() if isinstance(each, nn.ModuleList) and len(each) == number)
        layers = next(lists, None)
        if layers is None:
            return None
        del layers[FOLLOWED:]
        try:
            with self._mode:
                self._trained.to_empty(device=self._device)
            whole, layer = self._follow(layers, number, sequences, length, arguments)
            if not arguments.gradient_checkpointing:
                return int(whole)
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            inputs, _ = self._follow(layers, number, sequences, length, arguments)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        return int(inputs + layer)

    def _follow(
        self, layers: nn.ModuleList, number: int, sequences: int, length: int, arguments: TrainingArguments
    ) -> tuple[float, float]:
        """Bytes that are kept of all layers, and of one layer, from those of the first layers and of half of them."""
        first = list(layers)
        half = len(first) // 2
        most = self._saved_bytes(sequences, length, arguments)
        del layers[half:]
        least = self._saved_bytes(sequences, length, arguments)
        layers.extend(first[half:])
        layer = (most - least) / (len(first) - half)
        return most + layer * (number - len(first)), layer

    def _saved_bytes(self, sequences: int, length: int, arguments: TrainingArguments) -> int:
        own = {each.untyped_storage()._cdata for each in self._trained.parameters()}
        saved: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        self._trained.train()
        with (
            self._mode,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(self._device.type, torch.bfloat16, enabled=arguments.bf16),
        ):
            input_ids = torch.zeros(sequences, length, dtype=torch.long, device=self._device)
            hidden_states(self.model, input_ids, torch.ones_like(input_ids))
        return sum(storage.nbytes() for storage in saved.values())


def estimate_memory(student: FakeStudent, sequences: int, tokens: int, rows: int, run: Run) -> MemoryEstimate:
    """The memory of a rank at the peak of a step.

    Args:
        student: the student.
        sequences: sequences of the largest micro-batch.
        tokens: tokens that it computes.
        rows: its response tokens with a term of the loss.
        run: the run.
    """
    arguments, in_4bit = run.arguments, run.lora is not None and run.lora.load_in_4bit
    ranks, name = arguments.world_size, sharding_name(arguments)
    shards = [ranks if number < SHARDED.get(name or "", 0) else 1 for number in range(3)]
    trained = sum(each.nbytes for each in student.trained_parameters)
    copies = 2 if ranks > 1 and name is None else 1  # DDP keeps a copy of the gradient
    parts = {
        "weights": _weight_bytes(student, in_4bit) // shards[2],
        "gradients": copies * trained // shards[1],
        "optimizer": int(trained * _states(student.trained_parameters[0].dtype, arguments)) // shards[0],
        "loss_head": _head_bytes(student.model, rows, arguments),
    }
    shape = (sequences, tokens // sequences) if run.packing == "none" else (1, tokens)
    activations = student.activation_bytes(*shape, arguments)
    return MemoryEstimate(
        **parts,
        activations=activations,
        total=sum(parts.values()) + (activations or 0),
        sequences=sequences,
        tokens=tokens,
        device=str(arguments.device),
        device_memory=device_memory(arguments.device),
    )


def _weight_bytes(student: FakeStudent, in_4bit: bool) -> int:
    total = sum(each.nbytes for each in student.parameters)
    if in_4bit:
        head = read_head(student.model).weight
        own = {
            parameter
            for name, module in student.model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name
            for parameter in [module.weight]
            if parameter is not head
        }
        total -= int(sum(each.nbytes - NF4_BYTES * each.numel() for each in own))
    return total


def _head_bytes(model: PreTrainedModel, rows: int, arguments: TrainingArguments) -> int:
    """Logits of a chunk, the gradients of hidden states and head, and under bfloat16 a copy of the head."""
    weight = read_head(model).weight
    itemsize = 2 if arguments.bf16 else weight.itemsize
    on_gpu = arguments.device.type == "cuda"
    chunk = min(rows, triton_head.CHUNK_ROWS if on_gpu else torch_head.CHUNK_ROWS)
    logits = chunk * weight.shape[0] * (itemsize if on_gpu else 4)
    hidden = 2 * rows * weight.shape[1] * itemsize
    gradient = 4 * weight.numel() if weight.requires_grad else 0
    copy = itemsize * weight.numel() if itemsize != weight.itemsize else 0
    return logits + hidden + gradient + copy


def _states(dtype: torch.dtype, arguments: TrainingArguments) -> float:
    """Bytes that the optimizer keeps for each byte of a trained parameter, found out on a small layer."""
    if arguments.deepspeed or arguments.optim_target_modules:
        return ADAM_STATES
    layer = nn.Linear(TRIAL_WIDTH, TRIAL_WIDTH, bias=False, dtype=dtype, device=arguments.device)
    layer.weight.grad = torch.zeros_like(layer.weight)
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)  # type: ignore[arg-type]
        optimizer = make(layer.parameters(), **options)
        optimizer.step()
    except (ImportError, RuntimeError, TypeError, ValueError):
        return ADAM_STATES
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(each.nbytes for each in states if each.numel() > 1) / layer.weight.nbytes
