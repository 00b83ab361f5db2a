"""Names in what people publish."""

import pytest

from adpa.data.public_names import public_name


@pytest.mark.parametrize(
    "name", ["gpt2", "org/model", "meta-llama/Llama-3.1-8B-Instruct", "org/data:config", "runs/dpo"]
)
def test_a_name_that_may_be_of_the_hub_is_shown_whole(name: str) -> None:
    assert public_name(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/secret/prefs.jsonl", "prefs.jsonl"),
        ("/home/me/models/dpo/", "dpo"),
        ("~/models/dpo", "dpo"),
        ("../dpo", "dpo"),
        ("./dpo", "dpo"),
        ("clients/acme/dpo", "dpo"),
        ("s3://team/secret/prefs.jsonl", "prefs.jsonl"),
        ("s3://bucket/team/cache", "cache"),
        ("/", "/"),
    ],
)
def test_of_a_path_or_a_url_only_the_last_part_is_shown(name: str, shown: str) -> None:
    assert public_name(name) == shown
