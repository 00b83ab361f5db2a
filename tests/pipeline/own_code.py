"""Checkpoints that need code from their own directory: a Llama whose decoder doubles its hidden states."""

import json
import shutil
from pathlib import Path
from typing import Any

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_own import OwnConfig


class OwnModel(LlamaModel):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""
TOKENIZATION = '''
import json
from pathlib import Path

from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    """Words with spaces between, from a file of words."""

    vocab_files_names = {"vocab_file": "words.json"}

    def __init__(self, vocab_file, **options):
        self.words = json.loads(Path(vocab_file).read_text())
        self.names = {number: word for word, number in self.words.items()}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return self.words | self.added_tokens_encoder

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, number):
        return self.names.get(number, "<unk>")

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / f"{filename_prefix or ''}words.json"
        path.write_text(json.dumps(self.words))
        return (str(path),)
'''
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def edit_json(path: Path, **values: Any) -> None:
    """Sets values of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_own_code(llama: Path, directory: Path, modeling: str = MODELING) -> Path:
    """A copy of a Llama's checkpoint that needs the code beside its weights."""
    shutil.copytree(llama, directory)
    edit_json(directory / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    (directory / "configuration_own.py").write_text(CONFIGURATION)
    (directory / "modeling_own.py").write_text(modeling)
    return directory


def with_own_tokenizer(llama: Path, directory: Path) -> Path:
    """A copy of a checkpoint of words whose tokenizer is code."""
    shutil.copytree(llama, directory)
    words = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    (directory / "tokenizer.json").unlink()
    (directory / "words.json").write_text(json.dumps(words))
    edit_json(
        directory / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    (directory / "tokenization_own.py").write_text(TOKENIZATION)
    return directory
