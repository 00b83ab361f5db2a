"""What a study compares: a YAML file of methods, settings and seeds; ``lab/study.yaml`` is the laboratory's own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from adpa.errors import OptionError
from adpa.lab.advantages import AdvantageName
from adpa.lab.checkpoints import Plan, Recipe
from adpa.lab.environment import OPERATIONS, Environment
from adpa.lab.methods import OBJECTIVES, Method, method_options

OWN_STUDY = Path(__file__).with_name("study.yaml")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        seeds: of the laboratories that are reported.
        tuning_seeds: of the laboratories on which each method's options are chosen.
        prompts: held-out prompts that every student answers.
        plan: what a laboratory is built of.
        methods: what is compared, by name; each stands after the one that it begins with.
        variants: what is measured beside them, with the options that are written down.
    """

    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    prompts: int
    plan: Plan
    methods: Mapping[str, Method]
    variants: Mapping[str, Method]

    def settings(self) -> dict[str, Any]:
        """Everything but the seeds, as JSON has it: what two runs of one study share."""
        values = asdict(self)
        return {name: values[name] for name in ("tuning_seeds", "prompts", "plan", "methods", "variants")}


def read_study(path: Path = OWN_STUDY) -> Study:
    """Reads and checks a study.

    Raises:
        OptionError: the file cannot be read, or something in it is unknown or out of range.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"--study {path}: {' '.join(str(error).split())}") from error
    where = f"--study {path}"
    known = ("seeds", "tuning_seeds", "prompts", "laboratory", "options", "methods", "variants", "sweeps")
    content = _mapping(content, where, known)
    if missing := {"seeds", "methods"} - content.keys():
        raise OptionError(f"{where}: lacks {sorted(missing)[0]}")
    common = _mapping(content.get("options", {}), f"{where}: options", method_options("adpa"))
    methods, variants = (
        {
            str(name): _method(method, common, f"{where}: {part}: {name!r}")
            for name, method in _mapping(content.get(part, {}), f"{where}: {part}").items()
        }
        for part in ("methods", "variants")
    )
    for sweep in content.get("sweeps", []):
        variants |= _sweep(sweep, common, f"{where}: sweeps")
    tuning_seeds = check_seeds(content.get("tuning_seeds", []), f"{where}: tuning_seeds")
    seeds = check_seeds(content["seeds"], f"{where}: seeds")
    _check_methods(methods, variants, tuning_seeds, where)
    if shared := set(seeds) & set(tuning_seeds):
        raise OptionError(f"{where}: seed {min(shared)} is both tuned on and reported", "choose other seeds")
    prompts = content.get("prompts", 500)
    if not isinstance(prompts, int) or prompts < 1:
        raise OptionError(f"{where}: prompts {prompts!r}; expected a number of at least 1")
    plan = _plan(content.get("laboratory", {}), f"{where}: laboratory")
    return Study(seeds, tuning_seeds, prompts, plan, methods, variants)


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """The seeds, if each of them is a number of its own.

    Raises:
        OptionError: they are not.
    """
    if not isinstance(seeds, Sequence) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise OptionError(f"{where}: {seeds!r}; expected a list of numbers of at least 0")
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise OptionError(f"{where}: seed {twice[0]} is there twice", "name every seed once")
    return tuple(seeds)


def _method(content: Any, common: Mapping[str, Any], where: str) -> Method:
    own = {one.name for one in fields(Method)} - {"options", "swept"}
    objective = str(_mapping(content, where).get("objective"))
    if objective not in OBJECTIVES:
        raise OptionError(f"{where}: objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    options = method_options(objective)
    content = _mapping(content, where, own | set(options))
    trials = tuple(_mapping(trial, f"{where}: a trial", options) for trial in content.pop("trials", []))
    method = Method(
        **{name: value for name, value in content.items() if name in own},
        options={name: value for name, value in common.items() if name in options}
        | {name: value for name, value in content.items() if name in options},
        trials=trials,
    )
    if method.advantages not in get_args(AdvantageName):
        expected = ", ".join(get_args(AdvantageName))
        raise OptionError(f"{where}: advantages {method.advantages!r}; expected one of {expected}")
    return method


def _sweep(content: Any, common: Mapping[str, Any], where: str) -> dict[str, Method]:
    """A method with every combination of the values of some of its options."""
    content = _mapping(content, where)
    lists = {name: values for name, values in content.items() if isinstance(values, list) and name != "trials"}
    fixed = {name: value for name, value in content.items() if name not in lists and name != "name"}
    combinations = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    title = content.get("name", content.get("objective"))
    return {
        ", ".join([str(title), *(f"{name}={value:g}" for name, value in one.items())]): replace(
            _method(fixed | one, common, where), swept=one
        )
        for one in combinations
    }


def _check_methods(
    methods: Mapping[str, Method], variants: Mapping[str, Method], tuning_seeds: Sequence[int], where: str
) -> None:
    if both := methods.keys() & variants.keys():
        raise OptionError(f"{where}: {min(both)!r} is there twice", "give every method a name of its own")
    for name, method in {**methods, **variants}.items():
        if method.after is not None and (method.after not in methods or methods[method.after].after is not None):
            expected = "expected a method that begins with the SFT student"
            raise OptionError(f"{where}: {name!r} comes after {method.after!r}; {expected}")
        if method.control is not None and method.control not in methods:
            raise OptionError(f"{where}: {name!r} has the control {method.control!r}, which is no method")
        if method.trials and name in variants:
            raise OptionError(f"{where}: the variant {name!r} has trials", "make it a method, or leave them out")
        if method.trials and not tuning_seeds:
            raise OptionError(f"{where}: {name!r} has trials", "name tuning_seeds, or leave the trials out")


def _plan(content: Any, where: str) -> Plan:
    plan = Plan()
    content = dict(
        _mapping(content, where, {"pairs", "teacher", "student"} | {one.name for one in fields(Environment)})
    )
    environment = {one.name: content.pop(one.name) for one in fields(Environment) if one.name in content}
    environment["operations"] = tuple(environment.get("operations", OPERATIONS))
    if unknown := set(environment["operations"]) - set(OPERATIONS):
        raise OptionError(f"{where}: operation {sorted(unknown)[0]!r}; expected some of {', '.join(OPERATIONS)}")
    recipes = {one.name for one in fields(Recipe)}
    for role in ("teacher", "student"):
        content[role] = replace(getattr(plan, role), **_mapping(content.get(role, {}), f"{where}: {role}", recipes))
    return replace(plan, environment=Environment(**environment), **content)


def _mapping(content: Any, where: str, known: Any = None) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise OptionError(f"{where}: {content!r}; expected a mapping")
    content = {"on" if name is True else name: value for name, value in content.items()}  # YAML's own reading of it
    unknown = [] if known is None else sorted(map(str, content.keys() - set(known)))
    if unknown:
        raise OptionError(f"{where}: {unknown[0]!r} is unknown; expected some of {', '.join(sorted(known))}")
    return content
