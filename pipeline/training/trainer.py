"""The training step: transformers' Trainer with the loss of adpa, normalised over the whole optimizer step."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from adpa.data.batches import (
    Collator,
    Packing,
    TrainingExamples,
    TrainingSequence,
    computed_tokens,
    count_tokens,
)
from adpa.data.steps import StepSampler
from adpa.errors import ModelError, OptionError
from adpa.pipeline.training.collapse import Probe, collapse
from adpa.pipeline.training.objectives import TermWeights, plausible_advantages
from adpa.pipeline.training.ranks import on_all_ranks

logger = logging.getLogger(__name__)


class AtStart(TrainerCallback):
    """Calls a function before the first step that this process does."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Calls it."""
        self._begin()


class LogLastStep(TrainerCallback):
    """Has the last step logged, whatever the interval, so that no step goes unchecked."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Asks for a log at the last step."""
        control.should_log |= state.global_step >= state.max_steps
        return control


class StepLoader(DataLoader[Any]):
    """A loader whose sampler Trainer tells which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)

    def close(self) -> None:
        """Ends persistent workers. The garbage collector would close their queues first, and wait for seconds."""
        self._iterator = None


class DistillTrainer(Trainer):
    """Trains a student that ``attach_distill_head`` prepared.

    Each term is a mean over the response tokens of its own response set in the whole optimizer step: the loss and
    the gradient do not depend on how the step is cut into micro-batches or spread over ranks.

    Args:
        terms: name and term weights of each role, in the order of the roles.
        plausibility: see ``plausible_advantages``.
        model: the student.
        train_dataset: the examples.
        data_collator: what makes batches of them.
        packing: how it does.
        arguments: further ones of ``Trainer``.

    Attributes:
        warnings: what the user was warned of.
    """

    def __init__(
        self,
        *,
        terms: Sequence[tuple[str, TermWeights]],
        plausibility: float,
        model: PreTrainedModel,
        train_dataset: TrainingExamples,
        data_collator: Collator,
        packing: Packing,
        **arguments: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=train_dataset, data_collator=data_collator, **arguments)
        self.loss_is_scaled_for_ga = True
        self.add_callback(LogLastStep())
        self._student = model
        self._examples = train_dataset
        self._make_batch = data_collator
        self._packing = packing
        self._plausibility = plausibility
        self._names = [name for name, _ in terms]
        # One role more than there are terms: what counts for nothing.
        weights_R3 = torch.tensor([*(weights for _, weights in terms), TermWeights()])
        self._counts_R = (weights_R3 != 0).any(dim=1)
        self._weights_R3 = weights_R3.to(self.args.device)
        self._term_sums_R3 = torch.zeros_like(self._weights_R3)
        self._steps_summed = 0
        self._tokens = 0  # of this rank
        self._loader: StepLoader | None = None
        self._tokens_since: float | None = None  # on the clock, until they are logged
        self._probe = Probe(
            train_dataset,
            data_collator,
            [weights for _, weights in terms],
            self.args.per_device_train_batch_size,
            self.accelerator,
        )
        self.add_callback(AtStart(self._begin))
        self.warnings: list[str] = []

    def _sampler(self) -> StepSampler:
        args = self.args
        return StepSampler(
            len(self._examples),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            args.seed,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rank's micro-batches, as ``StepSampler`` deals them out."""
        args = self.args
        self._loader = StepLoader(
            self._examples,
            batch_sampler=self._sampler(),
            collate_fn=self._collate,
            num_workers=args.dataloader_num_workers,
            # A worker has the cache's memory maps and the collator from this process, and touches no GPU.
            multiprocessing_context="fork" if args.dataloader_num_workers else None,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # its own, so that a loader takes no random number from training
        )
        return self._loader

    def train(self, *arguments: Any, **options: Any) -> TrainOutput:
        """Trains, and ends the loader's workers."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._loader is not None:
                self._loader.close()

    def _collate(self, examples: Sequence[Sequence[TrainingSequence]]) -> dict[str, Tensor]:
        """The batch of a micro-batch, with the rows that count: none of them where the micro-batch is empty."""
        batch = self._make_batch(examples or [self._examples[0]])
        if not examples:
            batch["role"] = torch.full_like(batch["role"], len(self._names))
        return batch | {"rows": self._counts_R[batch["role"]].nonzero().squeeze(1)}

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], None]:
        """Takes the micro-batches of a step and puts the step's token counts into each of them."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a run that goes on from its last step; Trainer looks only after another one
        self._tokens_since = self._tokens_since or time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts_R = torch.stack([self._count_roles(batch) for batch in batches]).sum(0)
        counts_R = self.accelerator.reduce(self._prepare_input(counts_R), reduction="sum")
        for batch in batches:
            batch["step_tokens"] = counts_R
            if batch["role"][0] < len(self._names):
                self._tokens += int(count_tokens(batch))
        self._steps_summed += 1
        return batches, None

    def _count_roles(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["role"].bincount(minlength=len(self._counts_R))

    def _prepare_input(self, data: Any) -> Any:
        """Sends a tensor to the device without waiting, in its own dtype: Trainer would give signals DeepSpeed's."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's loss."""
        batch = dict(inputs)
        role_N = batch.pop("role")
        per_token_R1 = 1 / batch.pop("step_tokens").clamp(min=1)[:, None]
        weights_N3 = (self._weights_R3 * per_token_R1)[role_N]
        batch["advantages"] = plausible_advantages(batch["advantages"], batch["teacher_logprobs"], self._plausibility)
        nll, kl, advantage = weights_N3.unbind(1)
        loss, parts = model(**batch, nll_weight=nll, kl_weight=kl, advantage_weight=advantage)
        self._term_sums_R3.index_add_(0, role_N, torch.stack(parts, dim=1) * per_token_R1[role_N])
        loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, parts) if return_outputs else loss

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """One micro-batch. Head and embeddings of a sharded student are gathered once a step, not for each of them."""
        if isinstance(model, FSDPModule):
            for module in (model, self._student.get_input_embeddings(), self._student.get_output_embeddings()):
                if isinstance(module, FSDPModule):  # accelerate shards them apart, or with the whole
                    module.set_reshard_after_backward(self.accelerator.sync_gradients, recurse=False)
        return super().training_step(model, *arguments, **options)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader[Any] | None = None) -> Any:
        """Rehearses before DDP wraps the student, and tells DDP whether a trained parameter gets no gradient."""
        if training and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            unused = on_all_ranks(lambda: self._rehearse(model))
            if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = any(gather_object([unused]))
        return super()._wrap_model(model, training, dataloader)

    def _rehearse(self, model: nn.Module) -> bool:
        """Computes the gradient of the rank's largest micro-batch: a run that does not fit into memory fails at once.

        Where a step has several micro-batches, this one is computed twice, because the first one's gradient takes
        memory during the second. Meanwhile memory is also taken for what later steps hold: AdamW's moments, and DDP's
        copy of the gradient. The gradient is discarded, and the random state restored.

        Returns:
            Whether a trained parameter got no gradient.

        Raises:
            OptionError: there is no memory for it.
        """
        numbers = self._largest_micro_batch()
        try:
            self._compute_gradient(model, numbers)
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        unused = any(each.grad is None for each in model.parameters() if each.requires_grad)
        model.zero_grad()
        self._term_sums_R3.zero_()
        if not fits:  # raised here, where no tensor of the attempt is left: other ranks have to be told, on a full GPU
            lengths = [length for number in numbers for length in self._examples.lengths(number)]
            raise OptionError(
                f"--micro-batch-size {self.args.per_device_train_batch_size}: {self.args.device} has no memory for "
                f"{len(lengths)} sequences of up to {max(lengths)} tokens",
                "lower it, or use --packing, --gradient-checkpointing or --lora-rank",
            )
        return unused

    def _compute_gradient(self, model: nn.Module, numbers: Sequence[int]) -> None:
        """What ``_rehearse`` does with the examples of these numbers."""
        batch = self._collate([self._examples[number] for number in numbers])
        batch["step_tokens"] = self._count_roles(batch)
        trained = [each for each in model.parameters() if each.requires_grad]
        copies = self._copies_to_come()
        held = [torch.empty_like(each) for each in trained for _ in range(copies)]
        model.train()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            for _ in range(min(2, self.args.gradient_accumulation_steps)):
                with self.accelerator.autocast():
                    loss = self.compute_loss(model, self._prepare_inputs(batch))
                loss.backward()
        del held

    def _largest_micro_batch(self) -> list[int]:
        """The micro-batch of this rank, over all epochs, with the most tokens to compute."""
        sampler, largest, most = self._sampler(), list[int](), 0
        for epoch in range(self.state.num_train_epochs):
            sampler.set_epoch(epoch)
            for numbers in filter(None, sampler):
                lengths = [length for number in numbers for length in self._examples.lengths(number)]
                if (tokens := computed_tokens(lengths, self._packing)) > most:
                    largest, most = numbers, tokens
        return largest

    def _copies_to_come(self) -> int:
        """Numbers that will be kept beside each trained one and its gradient, and are not kept yet."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # as accelerate wraps it
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) and not optimizer.state else 0
        buckets = int(self.accelerator.num_processes > 1 and not self.is_fsdp_enabled)
        return moments + buckets

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Without the second names of tied weights, which weights gathered from ranks have as copies."""
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        state = None if state_dict is None else {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict=state)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of all ranks before rank 0 writes the file that says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_student(self, output: Path) -> None:
        """Writes the trained student as an ordinary checkpoint, gathered from the ranks where they share it."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            self._save(str(output), state_dict=state)

    @property
    def student_before(self) -> dict[str, float]:
        """The log before the first step; empty where no term needs signals."""
        return next((entry for entry in self.state.log_history if entry["step"] == 0), {})

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the sequences that all ranks trained on in a second; looks at the student are left out.

        Padding does not count, and a prompt counts with each of its responses, whatever the packing: this is the work
        that is done, not the computation that it takes.
        """
        logs = [(entry["tokens"], entry["tokens_per_second"]) for entry in self.state.log_history if "tokens" in entry]
        seconds = sum(tokens / per_second for tokens, per_second in logs)
        return sum(tokens for tokens, _ in logs) / seconds if seconds else 0.0

    def _begin(self) -> None:
        """Rehearses with a student that FSDP has sharded, and measures the student before the first step."""
        if self.is_fsdp_enabled:
            self._rehearse(self.model_wrapped)
        if self.state.global_step == 0 and (statistics := self._probe.measure(self.model_wrapped)):
            self.log(statistics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the means of every term and the tokens since the last time, and the student's statistics, beside what
        Trainer logs.

        The first time that these look like a collapse, it warns.

        Raises:
            ModelError: the loss is not finite.
        """
        if "loss" in logs:
            if not torch.isfinite(torch.tensor(logs["loss"])):
                raise ModelError(
                    f"step {self.state.global_step}: the loss is {logs['loss']}",
                    "lower --learning-rate or the weights of the terms, or check the student",
                )
            logs |= self._take_terms() | self._take_tokens() | self._probe.measure(self.model_wrapped)
        super().log(logs, start_time)
        warning = collapse(self.state.log_history, self._plausibility)
        if warning is not None and not self.warnings:
            self.warnings.append(warning)
            if self.is_world_process_zero():
                logger.warning(warning)

    def _take_terms(self) -> dict[str, float]:
        means_R3 = self.accelerator.reduce(self._term_sums_R3, reduction="sum") / max(self._steps_summed, 1)
        means = {
            f"{term}/{name}": means_R3[role, column].item()
            for role, name in enumerate(self._names)
            for column, term in enumerate(TermWeights._fields)
            if self._weights_R3[role, column] != 0
        }
        self._term_sums_R3.zero_()
        self._steps_summed = 0
        return means

    def _take_tokens(self) -> dict[str, float]:
        assert self._tokens_since is not None
        seconds = time.perf_counter() - self._tokens_since
        tokens = int(self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device), reduction="sum"))
        self._tokens = 0
        self._tokens_since = None
        return {"tokens": tokens, "tokens_per_second": tokens / seconds}
