"""Reads and checks a study: a YAML file of methods, settings and seeds. ``lab/study.yaml`` is the default study."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from adpa.errors import OptionError
from adpa.lab.advantages import AdvantageName
from adpa.lab.checkpoints import Plan
from adpa.lab.environment import OPERATIONS, Environment
from adpa.lab.methods import OBJECTIVES, Method, file_name, method_options, terms_of, trial_name
from adpa.lab.seed_list import check_seeds
from adpa.pipeline.training.ranges import check_ranges
from adpa.yaml_options import as_number, read_options

RESERVED = ("SFT student", "teacher")  # a study compares all methods with these
OWN_STUDY = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        seeds: seeds of the reported laboratories.
        tuning_seeds: seeds of the laboratories on which each method's options are tuned.
        prompts: held-out prompts that every student answers.
        plan: the settings of a laboratory.
        methods: the compared methods, by name; each follows the one that it starts from.
        variants: further methods, with fixed options.
    """

    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    prompts: int
    plan: Plan
    methods: Mapping[str, Method]
    variants: Mapping[str, Method]

    def settings(self) -> dict[str, Any]:
        """All settings but the seeds, as JSON values. Two runs of one study must agree in them."""
        values = asdict(self)
        return {name: values[name] for name in ("tuning_seeds", "prompts", "plan", "methods", "variants")}


def read_study(path: Path = OWN_STUDY, seeds: list[int] | None = None) -> Study:
    """Reads and checks a study.

    Args:
        path: the study's file.
        seeds: seeds to report instead of the file's.

    Raises:
        OptionError: the file cannot be read, or something in it is unknown or out of range.
    """
    content, where = read_options("--study", path), f"--study {path}"
    defaults: dict[str, Any] = {"seeds": [], "tuning_seeds": [], "prompts": 500, "laboratory": {}, "options": {}}
    defaults |= {"methods": {}, "variants": {}, "sweeps": []}
    content = _read(content, where, defaults)
    if missing := {"seeds", "methods"} - content.keys():
        raise OptionError(f"{where}: lacks {sorted(missing)[0]}")
    content = defaults | content
    common = _read(content["options"], f"{where}: options", method_options("adpa"))
    methods, variants = (
        {
            name: _method(method, common, f"{where}: {part}: {name!r}")
            for name, method in _read(content[part], f"{where}: {part}").items()
        }
        for part in ("methods", "variants")
    )
    for sweep in content["sweeps"]:
        for name, method in _sweep(sweep, common, f"{where}: sweeps").items():
            if name in variants:
                raise OptionError(f"{where}: sweeps: {name!r} occurs twice", "give every sweep a name of its own")
            variants[name] = method
    reported = check_seeds(seeds, "--seed") if seeds else check_seeds(content["seeds"], f"{where}: seeds")
    tuning_seeds = content["tuning_seeds"]
    if tuning_seeds:
        tuning_seeds = check_seeds(tuning_seeds, f"{where}: tuning_seeds")
    _check_methods(methods, variants, tuning_seeds, where)
    if shared := set(reported) & set(tuning_seeds):
        raise OptionError(f"{where}: seed {min(shared)} is both tuned on and reported", "choose other seeds")
    if content["prompts"] < 2:
        raise OptionError(f"{where}: prompts {content['prompts']}; expected at least 2")
    if not methods:
        raise OptionError(f"{where}: no methods; expected at least one")
    plan = _plan(content["laboratory"], f"{where}: laboratory")
    return Study(reported, tuple(tuning_seeds), content["prompts"], plan, methods, variants)


def _method(content: Any, common: Mapping[str, Any], where: str) -> Method:
    objective = str(_read(content, where).get("objective"))
    if objective not in OBJECTIVES:
        raise OptionError(f"{where}: objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    own = {one.name: one.default for one in fields(Method) if one.name not in ("options", "swept")}
    options = method_options(objective)
    content = _read(content, where, own | options)
    for name in ("after", "control", "advantages"):
        if not isinstance(content.get(name, ""), str):
            raise OptionError(f"{where}: {name} {content[name]!r}; expected a name")
    trials = [_read(trial, f"{where}: a trial", options) for trial in content.pop("trials", ())]
    method = Method(
        **{name: value for name, value in content.items() if name in own},
        options={name: value for name, value in {**common, **content}.items() if name in options},
        trials=tuple(trials),
    )
    if method.advantages not in get_args(AdvantageName):
        expected = ", ".join(get_args(AdvantageName))
        raise OptionError(f"{where}: advantages {method.advantages!r}; expected one of {expected}")
    if method.objective != "adpa" and (method.advantages != "log ratio" or method.prior):
        raise OptionError(f"{where}: advantages or prior with {objective}", "leave them out, or use adpa")
    if method.top_k < 1:
        raise OptionError(f"{where}: top_k {method.top_k}; expected at least 1")
    for trial in method.trials or ({},):
        _check_options(method, {**method.options, **trial}, where)
    return method


def _check_options(method: Method, options: Mapping[str, Any], where: str) -> None:
    """Checks options before any training. ``distill`` would refuse them, but only after an hour."""
    if method.objective == "dpo":
        return
    try:
        check_ranges(options)
        terms_of(method.objective, options)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _sweep(content: Any, common: Mapping[str, Any], where: str) -> dict[str, Method]:
    """The methods of a sweep: every combination of values of the options that have several."""
    content = _read(content, where)
    title = content.pop("name", content.get("objective"))
    lists = {name: values for name, values in content.items() if isinstance(values, list)}
    combinations = [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    return {
        ", ".join([str(title), *(f"{name}={value}" for name, value in one.items())]): replace(
            _method({**content, **one}, common, where), swept=one
        )
        for one in combinations
    }


def _check_methods(
    methods: Mapping[str, Method], variants: Mapping[str, Method], tuning_seeds: Sequence[int], where: str
) -> None:
    names = [*RESERVED, *methods, *variants]
    names += [trial_name(name, number + 1) for name, method in methods.items() for number in range(len(method.trials))]
    files = Counter(map(file_name, names))
    for name in names[len(RESERVED) :]:
        if files[file_name(name)] > 1 or not 0 < len(file_name(name)) <= 100:
            expected = "expected letters and digits, 100 at most, that no other method has, nor teacher or SFT student"
            raise OptionError(f"{where}: the name {name!r}; {expected}")
    if len({len(method.trials) for method in methods.values() if method.trials}) > 1:
        raise OptionError(f"{where}: methods with different numbers of trials", "give each the same number, or none")
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
    settings = vars(plan.environment) | {"pairs": plan.pairs, "teacher": {}, "student": {}}
    content = _read(content, where, settings)
    operations = content.get("operations", OPERATIONS)
    unknown = [operation for operation in operations if operation not in OPERATIONS]
    if unknown or not operations:
        problem = f"operation {unknown[0]!r}" if unknown else "no operations"
        raise OptionError(f"{where}: {problem}; expected some of {', '.join(OPERATIONS)}")
    recipes = {
        model: replace(recipe, **_read(content.get(model, {}), f"{where}: {model}", vars(recipe)))
        for model, recipe in (("teacher", plan.teacher), ("student", plan.student))
    }
    for model, recipe in recipes.items():
        if recipe.layers < 1 or recipe.width < 8 or recipe.width % 8:
            raise OptionError(f"{where}: {model}: {recipe.layers} layers of width {recipe.width}; expected 8, 16, …")
    for name, low, high in (("pairs", 1, None), ("candidates", 2, None), ("flipped", 0, 1), ("noise", 0, 2.5)):
        value = content.get(name, low)
        if value < low or (high is not None and value > high):
            expected = f"at least {low}" if high is None else f"between {low} and {high}"
            raise OptionError(f"{where}: {name} {value}; expected {expected}")
    drawn = {one.name: content[one.name] for one in fields(Environment) if one.name in content}
    environment = Environment(**drawn | {"operations": tuple(operations)})
    return Plan(environment, content.get("pairs", plan.pairs), **recipes)


def _read(content: Any, where: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Checks a mapping: its names must be in ``defaults``, with a number or a list where the default is one."""
    if not isinstance(content, Mapping):
        raise OptionError(f"{where}: {content!r}; expected a mapping")
    content = {name: as_number(value) for name, value in content.items()}
    if defaults is None:
        return content
    if unknown := sorted(content.keys() - defaults.keys()):
        raise OptionError(f"{where}: {unknown[0]!r} is unknown; expected some of {', '.join(sorted(defaults))}")
    for name, value in content.items():
        default = defaults[name]
        if _is_number(default) and not (_is_number(value) and (value >= 0 or name == "max_steps")):
            raise OptionError(f"{where}: {name} {value!r}; expected a number of at least 0")
        if type(default) is int and type(value) is not int:
            raise OptionError(f"{where}: {name} {value!r}; expected a whole number")
        if isinstance(default, list | tuple) and not isinstance(value, list):
            raise OptionError(f"{where}: {name} {value!r}; expected a list")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
