from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adpa.lab.environment import Environment
from adpa.lab.evaluate import MAX_NEW_TOKENS, Evaluation, evaluate, respond
from adpa.lab.tokenizer import build_tokenizer

ENVIRONMENT = Environment()
PROMPTS = ENVIRONMENT.evaluation_prompts(30, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    directory: Path = tmp_path_factory.mktemp("random")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    _random_model(len(tokenizer)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def evaluation(checkpoint: Path) -> Evaluation:
    return evaluate(checkpoint, PROMPTS, seed=0)


def test_the_same_seed_gives_the_same_evaluation(checkpoint: Path, evaluation: Evaluation) -> None:
    assert evaluate(checkpoint, PROMPTS, seed=0) == evaluation


def test_another_seed_changes_the_sampled_responses_only(checkpoint: Path, evaluation: Evaluation) -> None:
    other = evaluate(checkpoint, PROMPTS, seed=1)
    assert other.sampled != evaluation.sampled
    assert other.greedy == evaluation.greedy


def test_every_prompt_has_a_reward(evaluation: Evaluation) -> None:
    assert len(evaluation.sampled) == len(evaluation.greedy) == len(PROMPTS)
    assert all(0 <= value <= 1 for value in evaluation.sampled + evaluation.greedy)


def test_evaluation_leaves_the_global_generator_alone(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    evaluate(checkpoint, PROMPTS[:1], seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_response_stops_at_the_end_of_turn_and_nowhere_else() -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    model = _random_model(len(tokenizer))
    always = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.zeros_(always.weight)
    torch.nn.init.zeros_(always.bias)
    model.lm_head = always

    for token, expected in ((tokenizer.eos_token, ""), ("um", " ".join(["um"] * MAX_NEW_TOKENS))):
        with torch.no_grad():
            always.bias.zero_()
            always.bias[tokenizer.convert_tokens_to_ids(token)] = 1
        assert respond(model, tokenizer, PROMPTS[:2], do_sample=False) == [expected, expected]


def _random_model(vocabulary_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()
