"""Reads options from YAML files: ``on`` is a name, ``1e-3`` is a number, and a repeated name is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from adpa.errors import OptionError

LEADING_ZERO = re.compile("0[0-9]")  # of an octal number in YAML 1.1
NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def read_options(option: str, path: Path) -> Any:
    """Reads the YAML file that an option names. The names in its mappings stay text: ``on`` is not a truth value.

    Raises:
        OptionError: the file cannot be read, is not YAML, or has a name twice in one mapping.
    """
    return _read(option, path, _Loader)


def read_config(option: str, path: Path) -> dict[str, Any]:
    """Reads a YAML file of a command's options: numbers, and dates, are the text that was written.

    So a value of YAML is read as on the command line, and an id of digits stays what it is.

    Raises:
        OptionError: as ``read_options``, or the file is no mapping.
    """
    content = _read(option, path, _TextLoader)
    if isinstance(content, dict):
        return content
    kind = {list: "a list", str: "text", type(None): "nothing"}.get(type(content), "one value")
    raise OptionError(f"{option} {path}: found {kind}; expected a mapping", "write lines such as name: value")


def _read(option: str, path: Path, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise OptionError(f"{option} {path}: {error.strerror}", f"check {option}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise OptionError(f"{option} {path}: not a text file", "name a YAML file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise OptionError(f"{option} {path}: {place}{error.problem}", "correct the YAML") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise OptionError(f"{option} {path}: {' '.join(str(error).split())}", "correct the YAML") from error


def as_number(value: Any) -> Any:
    """The number that a text spells, such as 1e-3, which YAML reads as text; any other value unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class _Loader(yaml.SafeLoader):
    """Reads mappings as ``read_options`` says, and digits after a zero as text: an id may begin with one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for place, (key, value) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in names:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
                names.add(key.value)
                node.value[place] = (yaml.ScalarNode(TEXT, key.value, key.start_mark, key.end_mark), value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        text = str(self.construct_scalar(node))
        return text if LEADING_ZERO.match(text) else super().construct_yaml_int(node)


class _TextLoader(_Loader):
    """Reads numbers and dates as text, where a mapping or a list in it has one for a value."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if isinstance(node, yaml.MappingNode):
            for _, value in node.value:
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if one.tag in NUMBERS:
                        one.tag = TEXT
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
