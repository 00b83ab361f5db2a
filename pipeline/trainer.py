"""The training step: transformers' Trainer with the loss of adpa, normalised over the whole optimizer step."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adpa.data.batches import Collator, TrainingExamples, TrainingSequence, count_tokens
from adpa.data.steps import StepSampler
from adpa.errors import ModelError
from adpa.pipeline.objectives import TermWeights, plausible_advantages
from adpa.pipeline.probe import Probe, collapse

logger = logging.getLogger(__name__)


class LogStart(TrainerCallback):
    """Calls a function before the first step of a run; a resumed run has done it."""

    def __init__(self, log_start: Callable[[], None]) -> None:
        self._log_start = log_start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Calls it, if no step was done."""
        if state.global_step == 0:
            self._log_start()


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
        **arguments: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=train_dataset, data_collator=data_collator, **arguments)
        self.loss_is_scaled_for_ga = True
        self.add_callback(LogLastStep())
        self._student = model
        self._examples = train_dataset
        self._make_batch = data_collator
        self._plausibility = plausibility
        self._names = [name for name, _ in terms]
        # One role more than there are terms: what counts for nothing.
        self._weights_R3 = torch.tensor([*(weights for _, weights in terms), TermWeights()])
        self._term_sums_R3 = torch.zeros_like(self._weights_R3)
        self._steps_summed = 0
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._tokens_since: float | None = None  # on the clock, until they are logged
        self._probe = Probe(
            train_dataset,
            data_collator,
            [weights for _, weights in terms],
            self.args.per_device_train_batch_size,
            self.accelerator,
        )
        self.add_callback(LogStart(self._log_start))
        self.warnings: list[str] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rank's micro-batches, as ``StepSampler`` deals them out."""
        args = self.args
        sampler = StepSampler(
            len(self._examples),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            args.seed,
        )
        return StepLoader(
            self._examples,
            batch_sampler=sampler,
            collate_fn=self._collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # its own, so that a loader takes no random number from training
        )

    def _collate(self, examples: Sequence[Sequence[TrainingSequence]]) -> dict[str, Tensor]:
        """The batch of a micro-batch; of an empty one, a batch that counts for nothing."""
        if examples:
            return self._make_batch(examples)
        batch = self._make_batch([self._examples[0]])
        return batch | {"role": torch.full_like(batch["role"], len(self._names))}

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Takes the micro-batches of a step and puts the step's token counts into each of them."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a run that goes on from its last step; Trainer looks only after another one
        self._tokens_since = self._tokens_since or time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        roles = len(self._weights_R3)
        counts_R = torch.stack([batch["role"].bincount(minlength=roles) for batch in batches]).sum(0).to(device)
        counts_R = self.accelerator.reduce(counts_R, reduction="sum")
        for batch in batches:
            batch["step_tokens"] = counts_R
            counts = batch["role"][0] < len(self._names)
            self._tokens = self._tokens.to(device) + counts * count_tokens(batch).to(device)
        self._steps_summed += 1
        return batches, counts_R.sum()

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
        weights_N3 = (self._weights_R3.to(role_N.device) * per_token_R1)[role_N]
        batch["advantages"] = plausible_advantages(batch["advantages"], batch["teacher_logprobs"], self._plausibility)
        nll, kl, advantage = weights_N3.unbind(1)
        loss, parts = model(**batch, nll_weight=nll, kl_weight=kl, advantage_weight=advantage)
        self._term_sums_R3 = self._term_sums_R3.to(role_N.device)
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

    def _log_start(self) -> None:
        if statistics := self._probe.measure(self.model_wrapped):
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
        tokens = int(self.accelerator.reduce(self._tokens, reduction="sum"))
        self._tokens.zero_()
        self._tokens_since = None
        return {"tokens": tokens, "tokens_per_second": tokens / seconds}
