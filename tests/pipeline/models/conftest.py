"""A base and an adapter on it."""

from pathlib import Path

import pytest
from tests.pipeline.conftest import SMALL, save_random
from tests.pipeline.models.adapters import save_adapter
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(LlamaConfig(**SMALL, tie_word_embeddings=False), tmp_path_factory.mktemp("base")).directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))
