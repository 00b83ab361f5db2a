"""The commands that repeat a run, from adpa.json. Imports no torch."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from adpa.data.public_names import last_part, public_name

NOT_REPEATED = {"student", "cache", "output", "objective", "resume_from_checkpoint", "dry_run"}


def precompute_command(record: Mapping[str, Any]) -> str:
    """The ``adpa precompute`` that fills the cache; empty if the cache has not recorded its data."""
    sets = record["response_sets"]
    info = next(iter(sets.values()))
    if (made := info["record"]) is None:
        return ""
    scored = record["scored"] or {}
    options: dict[str, Any] = {"teacher": _model(scored["teacher"]) if scored else "TEACHER"}
    if reference := scored.get("reference"):
        options["reference"] = _model(reference)
    options |= {"data": public_name(made["data"]), "cache": "cache", "responses": ",".join(sets)}
    options |= {name: value for name, value in made.items() if name not in ("data", "time") and value}
    options |= {name: info[name] for name in ("max_prompt_length", "max_length", "rendered") if info[name]}
    if info["chat_template_kwargs"]:
        options["chat_template_kwargs"] = info["chat_template_kwargs"]
    if scored:
        options |= {"top_k": scored["top_k"], "dtype": scored["dtype"], "engine": scored["engine"].split()[0]}
        options |= {name: scored[name] for name, usual in (("top_p", 1), ("lossy", False)) if scored[name] != usual}
    if how := sets.get("sampled", {}).get("sampling"):
        options["student"] = _model(record["student"])
        options |= {name: how[name] for name in ("samples_per_prompt", "temperature", "max_new_tokens", "seed")}
        options["sampling_top_p"] = how["top_p"]
    return _command("precompute", options)


def distill_command(record: Mapping[str, Any]) -> str:
    """The ``adpa distill`` that trains the student, with the options that differ from the defaults."""
    options: dict[str, Any] = {"objective": record["objective"], "student": _model(record["student"])}
    options |= {"cache": "cache", "output": last_part(record["options"]["output"])}
    for name, value in record["options"].items():
        if name not in NOT_REPEATED:
            options[name] = [_public_setting(one) for one in value] if isinstance(value, list) else value
            if isinstance(value, str):
                options[name] = public_name(value)
    return _command("distill", options)


def _model(identity: Mapping[str, Any]) -> str:
    name = identity["name"].partition("@")[0]
    return f"{name}@{identity['revision']}" if identity["revision"] else last_part(identity["name"])


def _public_setting(text: str) -> str:
    key, equals, value = text.partition("=")
    return f"{key}={public_name(value)}" if equals else public_name(text)


def _command(command: str, options: Mapping[str, Any]) -> str:
    words = [f"adpa {command}"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [f"{option} {shlex.quote(_text(one))}" for one in (value if isinstance(value, list) else [value])]
    return " \\\n  ".join(words)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)
