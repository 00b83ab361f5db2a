"""Evaluates a checkpoint: the laboratory's reward of its responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adpa.lab.environment import Prompt, reward

MAX_NEW_TOKENS = 20
BATCH_SIZE = 256


@dataclass(frozen=True)
class Evaluation:
    """The reward of one response to each prompt, in the order of the prompts."""

    sampled: tuple[float, ...]
    greedy: tuple[float, ...]


def evaluate(checkpoint: Path, prompts: Sequence[Prompt], seed: int) -> Evaluation:
    """Rewards of responses sampled at temperature 1 and of greedy ones. The same seed gives the same samples."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = respond(model, tokenizer, prompts, do_sample=True)
    greedy = respond(model, tokenizer, prompts, do_sample=False)
    return Evaluation(_rewards(prompts, sampled), _rewards(prompts, greedy))


def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], do_sample: bool
) -> list[str]:
    """One response to each prompt, up to its end-of-turn token. Every other token becomes a word."""
    responses = []
    for start in range(0, len(prompts), BATCH_SIZE):
        chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts[start : start + BATCH_SIZE]]
        texts = [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        outputs = model.generate(  # type: ignore[operator]  # from GenerationMixin, beside PreTrainedModel
            **inputs,
            do_sample=do_sample,
            temperature=1.0 if do_sample else None,
            top_k=0 if do_sample else None,
            top_p=1.0 if do_sample else None,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        decoded = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
        responses += [text.partition(tokenizer.eos_token)[0].strip() for text in decoded]
    return responses


def mean(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards)


def _rewards(prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[float, ...]:
    return tuple(reward(prompt, response) for prompt, response in zip(prompts, responses, strict=True))
