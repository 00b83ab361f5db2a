"""The training step: transformers' Trainer with the loss of adpa, normalised over the whole optimizer step.

Shapes: N response tokens of a micro-batch; S training sets, and one more for tokens that do not count; 3 terms.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from adpa.data.batches import Collator, TrainingExamples, TrainingSequence, count_tokens
from adpa.data.sequences import Packing
from adpa.data.steps import StepSampler
from adpa.errors import ModelError
from adpa.pipeline.training.callbacks import AtStart, LogOften
from adpa.pipeline.training.collapse import Watch, collapse
from adpa.pipeline.training.divergence import divergence
from adpa.pipeline.training.loaders import HeldOutBatches, StepLoader, loading
from adpa.pipeline.training.objectives import TermWeights
from adpa.pipeline.training.plausibility import plausible_advantages
from adpa.pipeline.training.ranks import on_all_ranks
from adpa.pipeline.training.rehearsal import copies_to_come, fits_in_memory, largest_micro_batch, no_memory
from adpa.pipeline.training.term_sums import TermSums
from adpa.pipeline.training.validation import LOSS, HeldOutLosses, describe_evaluations

logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Trains a student that ``attach_distill_head`` prepared.

    Each term is a mean over the response tokens of its own response set in the whole optimizer step: the loss and
    the gradient do not depend on how the step is cut into micro-batches or spread over ranks.

    Args:
        terms: name and term weights of each training set, in their order.
        plausibility: see ``plausible_advantages``.
        model: the student.
        train_dataset: the examples.
        eval_dataset: the held-out examples, if any.
        data_collator: makes a batch of examples.
        packing: how a batch places its sequences.
        arguments: further arguments of ``Trainer``.

    Attributes:
        examples: the examples.
        warnings: warnings of the run.
    """

    def __init__(
        self,
        *,
        terms: Sequence[tuple[str, TermWeights]],
        plausibility: float,
        model: PreTrainedModel,
        train_dataset: TrainingExamples,
        eval_dataset: TrainingExamples | None,
        data_collator: Collator,
        packing: Packing,
        **arguments: Any,
    ) -> None:
        datasets: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model=model, **datasets, data_collator=data_collator, **arguments)
        self.loss_is_scaled_for_ga = True
        self.add_callback(LogOften())
        self._student = model
        self.examples = train_dataset
        self._held_out = eval_dataset
        self._make_batch = data_collator
        self._packing = packing
        self._plausibility = plausibility
        self._names = [name for name, _ in terms]
        # One set more than the data has: its tokens count for nothing.
        weights_S3 = torch.tensor([*(weights for _, weights in terms), TermWeights()])
        self._counts_S = (weights_S3 != 0).any(dim=1)
        self._weights_S3 = weights_S3.to(self.args.device)
        self._held_out_losses = HeldOutLosses(
            self._names,
            self._weights_S3,
            eval_dataset.with_signals if eval_dataset else (),
            plausibility,
            self.accelerator,
        )
        self._terms = TermSums(self._names, self._weights_S3, self.accelerator)
        self._tokens = 0  # of this rank
        self._loader: StepLoader | None = None
        self._tokens_since: float | None = None  # on the clock, until they are logged
        self._watch = Watch(
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
            len(self.examples),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            args.seed,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rank's micro-batches, in the order of ``StepSampler``."""
        args = self.args
        self._loader = StepLoader(
            self.examples,
            batch_sampler=self._sampler(),
            collate_fn=self._collate,
            persistent_workers=args.dataloader_persistent_workers,
            **loading(args),
        )
        return self._loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The rank's batches of held-out examples."""
        assert self._held_out is not None
        args = self.args
        return DataLoader(
            self._held_out,
            batch_sampler=HeldOutBatches(
                self._held_out, args.per_device_eval_batch_size, args.world_size, args.process_index
            ),
            collate_fn=partial(self._collate, counts_S=self._held_out_losses.counts_S),
            **loading(args),
        )

    def train(self, *arguments: Any, **options: Any) -> TrainOutput:
        """Trains, and ends the loader's workers."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._loader is not None:
                self._loader.close()

    def _collate(
        self, examples: Sequence[Sequence[TrainingSequence]], counts_S: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The batch of a micro-batch, with the rows that count: no rows for an empty micro-batch.

        The sets whose rows count are those with a term, unless ``counts_S`` says others.
        """
        counts_S = self._counts_S if counts_S is None else counts_S
        batch = self._make_batch(examples or [self.examples[0]])
        if not examples:
            batch["set_number"] = torch.full_like(batch["set_number"], len(self._names))
        return batch | {"rows": counts_S[batch["set_number"]].nonzero().squeeze(1)}

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], None]:
        """Takes the micro-batches of a step and puts the step's token counts into each of them."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return [], None  # resumed from its last step; Trainer checks only after one more
        self._tokens_since = self._tokens_since or time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts_S = torch.stack([self._count_tokens(batch) for batch in batches]).sum(0)
        counts_S = self.accelerator.reduce(self._prepare_input(counts_S), reduction="sum")
        for batch in batches:
            batch["step_tokens"] = counts_S
            if batch["set_number"][0] < len(self._names):
                self._tokens += int(count_tokens(batch))
        self._terms.begin_step(self.state.global_step)
        return batches, None

    def _count_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["set_number"].bincount(minlength=len(self._counts_S))

    def _prepare_input(self, data: Any) -> Any:
        """Sends a tensor to the device without waiting, in its own dtype; Trainer would cast signals to DeepSpeed's."""
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
        set_N = batch.pop("set_number")
        per_token_S1 = 1 / batch.pop("step_tokens").clamp(min=1)[:, None]
        weights_N3 = (self._weights_S3 * per_token_S1)[set_N]
        batch["advantages"] = plausible_advantages(batch["advantages"], batch["teacher_logprobs"], self._plausibility)
        nll, kl, advantage = weights_N3.unbind(1)
        loss, terms = model(**batch, nll_weight=nll, kl_weight=kl, advantage_weight=advantage)
        self._terms.add(set_N, torch.stack(terms, dim=1) * per_token_S1[set_N])
        loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, terms) if return_outputs else loss

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        """Computes one micro-batch; gathers the head and embeddings of a sharded student only once in a step."""
        if isinstance(model, FSDPModule):
            for module in (model, self._student.get_input_embeddings(), self._student.get_output_embeddings()):
                if isinstance(module, FSDPModule):  # accelerate shards them separately, or with the whole
                    module.set_reshard_after_backward(self.accelerator.sync_gradients, recurse=False)
        return super().training_step(model, *arguments, **options)

    def evaluation_loop(self, dataloader: DataLoader[Any], *_: Any, **__: Any) -> EvalLoopOutput:
        """Computes the losses on the held-out examples, in place of the predictions of Trainer's loop."""
        assert self._held_out is not None
        model, training = self.model_wrapped, self.model_wrapped.training
        model.eval()
        if callable(average := getattr(self.optimizer, "eval", None)):  # a schedule-free one
            average()
        self.callback_handler.eval_dataloader = dataloader
        losses = self._held_out_losses.measure(model, self._held_out_batches(dataloader))
        model.train(training)
        return EvalLoopOutput(None, None, losses, len(self._held_out))  # type: ignore[arg-type]  # no predictions

    def _held_out_batches(self, dataloader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
        for batch in dataloader:
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Does nothing at the end of a run that was resumed from its last step: all was done before."""
        if 0 < self._initial_global_step == self.state.global_step:
            self.control.should_evaluate = self.control.should_save = False
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader[Any] | None = None) -> Any:
        """Rehearses before DDP wraps the student; tells DDP if a trained parameter gets no gradient."""
        if training and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            unused = on_all_ranks(lambda: self._rehearse(model))
            if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = any(gather_object([unused]))
        return super()._wrap_model(model, training, dataloader)

    def _rehearse(self, model: nn.Module) -> bool:
        """Computes the gradient of this rank's largest micro-batch, and discards it.

        Returns:
            Whether a trained parameter got no gradient.

        Raises:
            OptionError: the micro-batch does not fit in memory.
        """
        numbers = largest_micro_batch(self._sampler(), self.examples, self.state.num_train_epochs, self._packing)
        batch = self._collate([self.examples[number] for number in numbers])
        batch["step_tokens"] = self._count_tokens(batch)

        def compute_loss() -> Tensor:
            with self.accelerator.autocast():
                loss: Tensor = self.compute_loss(model, self._prepare_inputs(batch))
            return loss

        passes = min(2, self.args.gradient_accumulation_steps)
        copies = copies_to_come(self.optimizer, self.accelerator.num_processes > 1 and not self.is_fsdp_enabled)
        fits = fits_in_memory(model, compute_loss, passes, copies, self.args.device)
        unused = any(each.grad is None for each in model.parameters() if each.requires_grad)
        model.zero_grad()
        self._terms.clear()
        if not fits:  # raised after the tensors are gone: telling the other ranks needs memory, on a full GPU
            raise no_memory(self.examples, numbers, self.args.per_device_train_batch_size, self.args.device)
        return unused

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves without the second names of tied weights: weights gathered from ranks have copies under them."""
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        state = None if state_dict is None else {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict=state)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the random state of every rank, before rank 0 writes the file that marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_student(self, output: Path) -> None:
        """Writes the trained student as an ordinary checkpoint, gathered from the ranks if it is sharded."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            self._save(str(output), state_dict=state)

    @property
    def terms(self) -> list[str]:
        """The terms of the loss, by their keys in a log."""
        return list(self._terms.weights)

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The logs with a loss, in order."""
        return [entry for entry in self.state.log_history if "loss" in entry]

    @property
    def evaluation(self) -> dict[str, Any]:
        """What the report says about the held-out examples."""
        return describe_evaluations(len(self._held_out or ()), self.args, self.state)

    @property
    def student_before(self) -> dict[str, float]:
        """The log before the first step; empty if no term needs signals."""
        return next((entry for entry in self.state.log_history if entry["step"] == 0 and LOSS not in entry), {})

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the sequences that all ranks trained on in a second, without the time of watching the student.

        Padding does not count. A prompt counts with each of its responses, whatever the packing: the number measures
        the work done, not the computation that it took.
        """
        logs = [(entry["tokens"], entry["tokens_per_second"]) for entry in self.state.log_history if "tokens" in entry]
        seconds = sum(tokens / per_second for tokens, per_second in logs)
        return sum(tokens for tokens, _ in logs) / seconds if seconds else 0.0

    def _begin(self) -> None:
        """Rehearses with an FSDP student, sharded by now, and measures the student before the first step.

        Before that every rank gets random numbers of its own for dropout; rank 0 keeps those that it has. A resumed run
        goes on with those of its checkpoint.
        """
        if self.args.process_index:
            set_seed(self.args.seed + self.args.process_index)
        if self.is_fsdp_enabled:
            self._rehearse(self.model_wrapped)
        if self.state.global_step == 0 and (statistics := self._watch.measure(self.model_wrapped)):
            self.log(statistics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term, the tokens and the student's statistics to Trainer's log.

        Warns of a collapse and of a divergence, once each.

        Raises:
            ModelError: a loss is not finite.
        """
        for key, where in (("loss", ""), (LOSS, " on held-out examples")):
            if not math.isfinite(logs.get(key, 0)):
                raise ModelError(
                    f"step {self.state.global_step}: the loss{where} is {logs[key]}",
                    "lower --learning-rate or the weights of the terms, or check the student",
                )
        if "loss" in logs:
            logs |= (
                self._terms.take(self.state.global_step) | self._take_tokens() | self._watch.measure(self.model_wrapped)
            )
        super().log(logs, start_time)
        history = self.state.log_history
        for warning in (
            collapse(history, self._plausibility),
            divergence(history, self._terms.weights, self.state.max_steps),
        ):
            if warning is not None and warning not in self.warnings:
                self.warnings.append(warning)
                if self.is_world_process_zero():
                    logger.warning(warning)

    def _take_tokens(self) -> dict[str, float]:
        assert self._tokens_since is not None
        seconds = time.perf_counter() - self._tokens_since
        tokens = int(self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device), reduction="sum"))
        self._tokens = 0
        self._tokens_since = None
        return {"tokens": tokens, "tokens_per_second": tokens / seconds}
