"""LoRA and QLoRA as their users see them; their training against dense float64 and against that of all weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tests.pipeline.conftest import SMALL, Filled, save_random, say_quantized
from tests.pipeline.training.test_trainer import dense_loss, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from adpa import distill
from adpa.errors import ModelError, OptionError
from adpa.pipeline.distill import DistillReport
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.training.lora import add_adapters, load_base, merge_adapters
from adpa.pipeline.training.lora_settings import lora_settings
from adpa.pipeline.training.student import attach_distill_head

RANK, SCALE = 4, 2.0  # alpha is twice the rank
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def train(filled: Filled, output: Path, **options: Any) -> DistillReport:
    """Four steps that move adapters well away from their beginning."""
    defaults: dict[str, Any] = {
        "objective": "dckd",
        "student": str(filled.models.student),
        "batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "lora_rank": RANK,
    }
    return distill(cache=filled.cache, output=output, **(defaults | options))


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((output / "adpa.json").read_text())["losses"]]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def adapters(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every weight that has an adapter, in float64."""
    loaded = load_file(folder / "adapter_model.safetensors")
    stems = {name.rpartition(".lora_")[0] for name in loaded}
    assert len(loaded) == 2 * len(stems)
    return {
        stem.removeprefix("base_model.model.") + ".weight": (
            loaded[f"{stem}.lora_A.weight"].double(),
            loaded[f"{stem}.lora_B.weight"].double(),
        )
        for stem in stems
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.arange(5, 45)[None]).logits
    return logits


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "qlora"])
def trained(request: pytest.FixtureRequest, few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(few_words, output, load_in_4bit=request.param, save_steps=2)
    return output


def test_the_first_loss_is_that_of_full_training_and_it_falls(few_words: Filled, tmp_path: Path) -> None:
    full = train(few_words, tmp_path / "full", lora_rank=None, max_steps=1)
    report = train(few_words, tmp_path / "lora")
    assert report.first_loss == pytest.approx(full.first_loss, rel=1e-6)
    assert report.last_loss < report.first_loss


def test_the_gradient_of_the_adapters_is_that_of_the_weights_by_the_chain_rule(
    few_words: Filled, tmp_path: Path
) -> None:
    """Between two steps of plain gradient descent over all examples; before the first, B is 0, and A's gradient."""
    rate = 3.0
    train(
        few_words,
        tmp_path,
        batch_size=8,
        max_steps=2,
        save_steps=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0,
        set=["optim=sgd"],
    )
    before, after = adapters(tmp_path / "checkpoint-1"), adapters(tmp_path / "checkpoint-2")
    model = AutoModelForCausalLM.from_pretrained(few_words.models.student, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in before.items():
            parameters[name].add_(SCALE * b @ a)
    dense_loss(few_words, model, {"chosen": (1.0, 1.0, 0.0), "rejected": (0.0, 1.0, 0.0)}).backward()
    result, expected = {}, {}
    for name, (a, b) in before.items():
        gradient = parameters[name].grad
        assert gradient is not None
        for which, was, became, true in (
            ("A", a, after[name][0], SCALE * b.T @ gradient),
            ("B", b, after[name][1], SCALE * gradient @ a.T),
        ):
            result[f"{which} of {name}"], expected[f"{which} of {name}"] = (was - became) / rate, true
    for which in "AB":
        names = [name for name in result if name[0] == which]
        error = relative_error({n: result[n] for n in names}, {n: expected[n] for n in names})
        assert error < 1e-4


def test_the_output_is_an_ordinary_checkpoint_with_the_adapters_in_its_unquantized_weights(
    trained: Path, few_words: Filled
) -> None:
    before, after = weights(few_words.models.student), weights(trained)
    moved = adapters(trained / "adapter")
    assert after.keys() == before.keys()
    assert {name.split(".")[-2] for name in moved} == LAYERS
    for name, tensor in before.items():
        expected = tensor.double().clone()
        if name in moved:
            a, b = moved[name]
            assert (b @ a).any()
            expected += SCALE * b @ a
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert not hasattr(model.config, "quantization_config")


def test_the_merged_student_says_what_the_adapters_say_on_the_student(trained: Path, few_words: Filled) -> None:
    student = AutoModelForCausalLM.from_pretrained(few_words.models.student)
    before = logits(student)
    with_adapters = logits(PeftModel.from_pretrained(student, str(trained / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(trained))
    assert (merged - before).abs().max() > 0.1
    torch.testing.assert_close(merged, with_adapters, rtol=0, atol=1e-5 * merged.abs().max().item())
    by_name = AutoPeftModelForCausalLM.from_pretrained(str(trained / "adapter"))
    assert torch.equal(logits(by_name), with_adapters)


def test_it_has_the_configuration_and_tokenizer_of_a_fully_trained_student(
    trained: Path, few_words: Filled, tmp_path: Path
) -> None:
    train(few_words, tmp_path, lora_rank=None, max_steps=1)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        result, expected = (json.loads((folder / name).read_text()) for folder in (trained, tmp_path))
        expected |= {key: result[key] for key in ("use_cache",) if key in result}  # Trainer's, of no model
        assert result == expected, name


def test_the_next_stage_takes_the_output_as_its_student(trained: Path, few_words: Filled, tmp_path: Path) -> None:
    report = train(few_words, tmp_path, student=str(trained), objective="kd")
    assert report.last_loss < report.first_loss


def test_the_record_says_what_was_trained(trained: Path) -> None:
    record = json.loads((trained / "adpa.json").read_text())
    in_4bit = record["lora"].pop("load_in_4bit")
    assert record["lora"] == {"rank": RANK, "alpha": 2 * RANK, "dropout": 0.0, "targets": "all-linear"}
    assert record["trained_parameters"] == sum(a.numel() + b.numel() for a, b in adapters(trained / "adapter").values())
    assert {"peft", "bitsandbytes"} & record["versions"].keys() == ({"peft", "bitsandbytes"} if in_4bit else {"peft"})


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    trained: Path, few_words: Filled, tmp_path: Path
) -> None:
    record = (trained / "adpa.json").read_text()
    (tmp_path / "adpa.json").write_text(record)
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob("checkpoint-2/model*"))  # adapters alone
    in_4bit = json.loads(record)["lora"]["load_in_4bit"]
    train(few_words, tmp_path, load_in_4bit=in_4bit, save_steps=2, resume_from_checkpoint="last")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = load_file(trained / file), load_file(tmp_path / file)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("other", [{"lora_rank": 8}, {"lora_target": "q_proj"}, {"lora_rank": None}])
def test_a_run_does_not_go_on_with_other_adapters(
    other: dict[str, Any], trained: Path, few_words: Filled, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"its run has the lora \{'(rank|targets)'"):
        train(few_words, tmp_path, **other, resume_from_checkpoint=str(trained / "checkpoint-2"))


def test_only_the_targets_get_adapters(few_words: Filled, tmp_path: Path) -> None:
    report = train(few_words, tmp_path, lora_target="v_proj, q_proj", max_steps=1)
    assert {name.split(".")[-2] for name in adapters(tmp_path / "adapter")} == {"q_proj", "v_proj"}
    assert report.trained_parameters == 2 * 2 * RANK * (32 + 32)  # two layers
    assert json.loads((tmp_path / "adpa.json").read_text())["lora"]["targets"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_gradient_checkpointing_changes_nothing(
    reentrant: str, trained: Path, few_words: Filled, tmp_path: Path
) -> None:
    in_4bit = json.loads((trained / "adpa.json").read_text())["lora"]["load_in_4bit"]
    kwargs = f"gradient_checkpointing_kwargs={{use_reentrant: {reentrant}}}"
    train(few_words, tmp_path, load_in_4bit=in_4bit, gradient_checkpointing=True, set=[kwargs])
    torch.testing.assert_close(weights(tmp_path), weights(trained), rtol=1e-5, atol=1e-6)


def test_adapters_are_in_float32_beside_weights_in_bfloat16(few_words: Filled, tmp_path: Path) -> None:
    train(few_words, tmp_path, dtype="bfloat16", bf16=True)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


# The frozen head


class Made(TorchDispatchMode):
    """Remembers the sizes of all tensors that operations make; a view is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in views:
                self.sizes.add(each.numel())
        return result


FROZEN = {"untied": LlamaConfig(**SMALL), "tied": Qwen2Config(**SMALL, tie_word_embeddings=True)}


@pytest.mark.parametrize("name", FROZEN)
def test_no_gradient_of_the_heads_size_is_made(name: str, tmp_path: Path) -> None:
    def sizes_of_a_step(rank: int | None) -> set[int]:
        checkpoint = save_random(FROZEN[name], tmp_path)
        model = checkpoint.load("float32", torch.device("cpu"))
        attach_distill_head(model)
        settings = lora_settings(rank, None, load_in_4bit=False)
        student = model if settings is None else add_adapters(model, settings)
        predicts = torch.tensor([3, 4, 5, 10, 11, 12])
        rows = {name: torch.ones(6) for name in ("nll_weight", "kl_weight", "advantage_weight")}
        ids = torch.randint(96, (6, 5))
        with Made() as made:
            loss, _ = student(
                input_ids=torch.randint(96, (2, 7)),
                attention_mask=torch.ones(2, 7, dtype=torch.long),
                predicts=predicts,
                labels=ids[:, 0],
                topk_ids=ids,
                teacher_logprobs=torch.full((6, 5), -3.0),
                tail_logprob=torch.full((6,), -0.3),
                advantages=torch.randn(6, 5),
                **rows,
            )
            loss.backward()
        return made.sizes

    vocabulary_times_width = SMALL["vocab_size"] * SMALL["hidden_size"]
    assert vocabulary_times_width in sizes_of_a_step(None)
    assert max(sizes_of_a_step(RANK)) < vocabulary_times_width


# Kinds of models


ARCHITECTURES: dict[str, PretrainedConfig] = FROZEN | {
    "convolutions": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_changes_what_a_model_says_by_rounding_alone(name: str, tmp_path: Path) -> None:
    checkpoint = save_random(ARCHITECTURES[name], tmp_path / "student")
    settings = lora_settings(RANK, None, load_in_4bit=False)
    assert settings is not None
    model = add_adapters(load_base(checkpoint, settings, "float32", "float32", torch.device("cpu")), settings)
    before = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = logits(merge_adapters(checkpoint, tmp_path / "adapter", "float32"))
    assert (merged - before).abs().max() > 0.1
    torch.testing.assert_close(merged, logits(model), rtol=0, atol=1e-5 * merged.abs().max().item())


def test_adapters_of_a_student_of_the_hub_say_its_name_there(tmp_path: Path) -> None:
    local = save_random(FROZEN["tied"], tmp_path / "student")
    checkpoint = Checkpoint("org/student@main", "0123abcd", local.directory)
    settings = lora_settings(RANK, None, load_in_4bit=False)
    assert settings is not None
    model = add_adapters(load_base(checkpoint, settings, "float32", "float32", torch.device("cpu")), settings)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(checkpoint, tmp_path / "adapter", "float32")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/student", "0123abcd")


# Four bits


@pytest.mark.parametrize("name", FROZEN)
def test_the_layers_are_held_in_4_bits_and_head_and_embeddings_are_not(name: str, tmp_path: Path) -> None:
    checkpoint = save_random(FROZEN[name], tmp_path)
    settings = lora_settings(RANK, None, load_in_4bit=True)
    assert settings is not None
    model = load_base(checkpoint, settings, "bfloat16", "bfloat16", torch.device("cpu"))
    attach_distill_head(model)
    in_4bit = [each for each, parameter in model.named_parameters() if parameter.dtype == torch.uint8]
    assert {each.split(".")[-2] for each in in_4bit} == LAYERS
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_qlora_trains_as_lora_does_on_the_dequantized_student(few_words: Filled, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(few_words.models.student))
    settings = lora_settings(RANK, None, load_in_4bit=True)
    assert settings is not None
    base = load_base(checkpoint, settings, "float32", "float32", torch.device("cpu"))
    base.dequantize().save_pretrained(tmp_path / "dequantized")
    checkpoint.tokenizer.save_pretrained(tmp_path / "dequantized")
    train(few_words, tmp_path / "qlora", load_in_4bit=True)
    train(few_words, tmp_path / "lora", student=str(tmp_path / "dequantized"))
    train(few_words, tmp_path / "original")
    assert losses(tmp_path / "qlora") == pytest.approx(losses(tmp_path / "lora"), rel=1e-5)
    assert losses(tmp_path / "qlora")[0] != pytest.approx(losses(tmp_path / "original")[0], rel=1e-3)
    result, expected = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("qlora", "lora"))
    assert relative_error(result, expected) < 1e-3


def test_qlora_computes_in_bfloat16_where_the_run_does(few_words: Filled, tmp_path: Path) -> None:
    plain = train(few_words, tmp_path / "plain", load_in_4bit=True, max_steps=1)
    bf16 = train(few_words, tmp_path / "bf16", load_in_4bit=True, max_steps=1, bf16=True, dtype="bfloat16")
    assert bf16.first_loss == pytest.approx(plain.first_loss, rel=0.02)
    assert bf16.first_loss != plain.first_loss


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, r"--lora-rank 0; expected at least 1"),
        ({"lora_rank": None, "lora_target": "q_proj"}, r"--lora-target without --lora-rank"),
        ({"lora_rank": None, "load_in_4bit": True}, r"--load-in-4bit without --lora-rank"),
        ({"lora_target": "q_proj,"}, r"--lora-target q_proj,; expected all-linear, or names"),
        ({"lora_target": "q_proj,all-linear"}, r"expected all-linear, or names"),
        (
            {"lora_target": "q_prj"},
            r"q_prj: no linear layer.*expected one of down_proj, gate_proj, .*v_proj; did you mean q_proj\?$",
        ),
        ({"lora_target": "q_proj,q_prj"}, r"q_prj: no linear layer"),
        ({"lora_target": ""}, r"--lora-target ''; expected all-linear, or names"),
        (
            {"lora_rank": 33},
            r"^--lora-rank 33: larger than the layer model\.layers\.0\.self_attn\.q_proj \(32 × 32\); "
            r"choose 32 at most, or name larger layers with --lora-target$",
        ),
        ({"lora_rank": 64, "lora_target": "down_proj"}, r"rank 64: larger than the layer .*down_proj \(48 × 32\)"),
        ({"lora_rank": 10**6, "load_in_4bit": True}, r"rank 1000000: larger than the layer .*\(32 × 32\)"),
        ({"lora_target": "self_attn"}, r"self_attn: no linear layer"),
        ({"lora_target": "lm_head"}, r"lm_head: the head and the embeddings stay"),
        ({"lora_target": "q_proj,embed_tokens"}, r"embed_tokens: the head and the embeddings stay"),
    ],
)
def test_targets_and_ranks_that_cannot_be_used_are_refused(
    options: dict[str, Any], message: str, few_words: Filled, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        train(few_words, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "extra"), [("peft", "lora"), ("bitsandbytes", "qlora")])
def test_a_package_that_is_not_installed_is_asked_for(
    missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"peft": object(), "bitsandbytes": object(), missing: None}
    monkeypatch.setattr("adpa.pipeline.training.lora_settings.find_spec", installed.get)
    with pytest.raises(OptionError, match=rf"needs {missing}, which is not installed; pip install 'adpa\[{extra}\]'"):
        lora_settings(16, None, load_in_4bit=True)


def test_a_student_quantized_on_disk_is_refused(tmp_path: Path) -> None:
    checkpoint = save_random(FROZEN["tied"], tmp_path)
    say_quantized(checkpoint)
    settings = lora_settings(RANK, None, load_in_4bit=False)
    assert settings is not None
    with pytest.raises(ModelError, match="its weights are quantized on disk"):
        load_base(checkpoint, settings, "float32", "float32", torch.device("cpu"))
