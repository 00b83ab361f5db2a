"""The options of vLLM: their meaning, their checks, and which of them can change a number."""

from typing import Any

import pytest
from tests.pipeline.scoring.conftest import LARGE_MODEL

from adpa.errors import OptionError
from adpa.pipeline.scoring.vllm_options import VllmOptions


def test_the_large_models_share_gpus_and_are_quantized_and_the_student_is_not() -> None:
    options = VllmOptions(tensor_parallel=4, quantization="fp8", gpu_memory_utilization=0.8)
    large = {"gpu_memory_utilization": 0.8, "tensor_parallel_size": 4, "quantization": "fp8"}
    assert options.arguments("teacher") == options.arguments("reference") == large
    assert options.arguments("student") == {"gpu_memory_utilization": 0.8}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("max_num_seqs=64", "max_num_seqs", 64),
        ("max-num-seqs=64", "max_num_seqs", 64),
        ("enforce_eager=true", "enforce_eager", True),
        ("cpu_offload_gb=0.5", "cpu_offload_gb", 0.5),
        ("kv_cache_dtype=fp8", "kv_cache_dtype", "fp8"),
        ("tokenizer_mode=", "tokenizer_mode", ""),
        ('hf_overrides={"rope_theta": 1e6, "x": "a=b:c"}', "hf_overrides", {"rope_theta": 1e6, "x": "a=b:c"}),
        ("download_dir=/a:b=c", "download_dir", "/a:b=c"),
        ("revision=null", "revision", None),
    ],
)
def test_the_value_of_an_engine_argument_is_json_or_else_its_text(text: str, key: str, value: object) -> None:
    assert VllmOptions(engine_arg=(text,)).arguments("teacher") == LARGE_MODEL | {key: value}


def test_an_engine_argument_is_for_every_model_or_for_the_one_that_it_names() -> None:
    options = VllmOptions(engine_arg=("seed=1", "teacher:max_num_seqs=8", "student:quantization=fp8"))
    assert options.arguments("teacher") == LARGE_MODEL | {"seed": 1, "max_num_seqs": 8}
    assert options.arguments("reference") == LARGE_MODEL | {"seed": 1}
    assert options.arguments("student") == {"gpu_memory_utilization": 0.9, "seed": 1, "quantization": "fp8"}


def test_an_engine_argument_outranks_the_option_and_one_models_own_outranks_that_of_all() -> None:
    options = VllmOptions(
        tensor_parallel=2, engine_arg=("teacher:tensor_parallel_size=8", "tensor_parallel_size=4", "seed=1", "seed=2")
    )
    assert options.arguments("teacher") == {**LARGE_MODEL, "tensor_parallel_size": 8, "seed": 2}
    assert options.arguments("reference") == {**LARGE_MODEL, "tensor_parallel_size": 4, "seed": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "--tensor-parallel 0; expected at least 1"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0; expected more than 0"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5; expected more than 0 and at most 1"),
        ({"max_model_len": 0}, "--max-model-len 0; expected at least 1"),
        ({"engine_arg": ("max_num_seqs",)}, "--engine-arg max_num_seqs; expected key=value"),
        ({"engine_arg": ("=3",)}, "--engine-arg =3; expected key=value"),
        ({"engine_arg": ("teacher:=3",)}, "--engine-arg teacher:=3; expected key=value"),
        ({"engine_arg": ("judge:seed=3",)}, "expected key=value, or teacher|reference|student:key=value"),
        ({"engine_arg": (":seed=3",)}, "expected key=value"),
        ({"engine_arg": ("gpu_memory_utilization=much",)}, "gpu_memory_utilization: found 'much'; expected a number"),
        ({"engine_arg": ("hf_overrides=foo",)}, "hf_overrides: found 'foo'; expected a JSON object"),
        ({"engine_arg": ('hf_overrides={"head_dtype": "model"}',)}, "found head_dtype; use --head-dtype"),
        ({"engine_arg": ("model=other",)}, "--engine-arg model: adpa sets it"),
        ({"engine_arg": ("student:max-model-len=9",)}, "adpa sets it; leave it out; --max-model-len is an option"),
        ({"engine_arg": ("enable_prefix_caching=true",)}, "--engine-arg enable_prefix_caching: adpa sets it"),
        ({"engine_arg": ("speculative_config={}",)}, "--engine-arg speculative_config: adpa sets it"),
    ],
)
def test_an_option_that_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        VllmOptions(**options).check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        *("config_format=mistral", "hf_config_path=/other", "model_weights=/other"),
        *(
            "load_format=dummy",
            "load_format=mistral",
            "load_format=sharded_state",
            "load_format=auto",
            "load-format=pt",
        ),
        *("spec_model=other", "default_mm_loras={}", "teacher:revision=other", "hf_token=secret"),
    ],
)
def test_what_would_load_other_files_than_the_digested_ones_is_refused(argument: str) -> None:
    key = argument.partition("=")[0].rpartition(":")[2].replace("-", "_")
    with pytest.raises(OptionError, match=f"--engine-arg {key}: vLLM would load something else than the files"):
        VllmOptions(engine_arg=(argument,)).check()


def test_code_of_a_repository_has_an_option_of_its_own() -> None:
    with pytest.raises(OptionError, match="--engine-arg trust_remote_code: adpa sets it; use --trust-remote-code"):
        VllmOptions(engine_arg=("trust_remote_code=true",)).check()


def test_a_quantization_in_a_file_that_nobody_digests_is_refused() -> None:
    with pytest.raises(OptionError, match="hf_overrides: found quantization_config_file; give its content as"):
        VllmOptions(engine_arg=('hf_overrides={"quantization_config_file": "/tmp/x.json"}',)).check()


@pytest.mark.parametrize("load_format", ["hf", "safetensors", "fastsafetensors", "instanttensor"])
def test_another_way_to_read_the_same_files_is_allowed_and_named(load_format: str) -> None:
    options = VllmOptions(engine_arg=(f"teacher:load_format={load_format}",))
    options.check()
    assert options.numerics("teacher") == [f'teacher:load_format="{load_format}"']


def test_the_defaults_and_what_vllm_understands_pass_the_check() -> None:
    VllmOptions().check()
    VllmOptions(2, "fp8", 4096, 1.0, "model", ("seed=1", "teacher:max_num_seqs=3")).check()


def test_what_changes_numbers_is_told_apart_from_what_changes_only_speed_and_memory() -> None:
    options = VllmOptions(
        tensor_parallel=2,
        quantization="fp8",
        max_model_len=99,
        gpu_memory_utilization=0.5,
        engine_arg=("kv_cache_dtype=fp8", "max_num_seqs=3", "reference:hf_overrides={}", "enforce_eager=true"),
    )
    assert options.numerics("teacher") == ['teacher:kv_cache_dtype="fp8"', 'teacher:quantization="fp8"']
    assert options.numerics("reference") == [
        "reference:hf_overrides={}",
        'reference:kv_cache_dtype="fp8"',
        'reference:quantization="fp8"',
    ]
    assert options.numerics("student") == ['student:kv_cache_dtype="fp8"']


def test_an_argument_that_nobody_has_heard_of_is_taken_for_one_that_changes_numbers() -> None:
    assert VllmOptions(engine_arg=("new_knob=1",)).numerics("teacher") == ["teacher:new_knob=1"]
