"""The optimizers of ``--set optim`` and their arguments. Imports no torch."""

from importlib.util import find_spec

from adpa.errors import OptionError, did_you_mean

BUILT_IN = "adamw_torch"
# The arguments that each optimizer of torch and transformers takes from ``--set optim_args``.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
# The package that other optimizers come from, by a part of their name; and what pip calls it.
PACKAGES = {
    "xla": ("torch_xla", "torch_xla"),
    "npu": ("torch_npu", "torch_npu"),
    "anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    "galore": ("galore_torch", "galore-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "": ("bitsandbytes", "bitsandbytes"),
}
TRUTH_VALUES = ("nesterov", "centered")


def check_optimizer(name: str, arguments: str | None) -> None:
    """Checks that an optimizer is installed, and takes the arguments of ``--set optim_args``.

    Args:
        name: one of transformers' optimizers.
        arguments: key=value with commas between them.

    Raises:
        OptionError: it is not installed, or an argument is unknown or no number.
    """
    package, to_install = next(each for part, each in PACKAGES.items() if part in name)
    if name not in ARGUMENTS and find_spec(package) is None:
        raise OptionError(f"--set optim={name} needs {package}, which is not installed", f"pip install {to_install}")
    for argument in (arguments or "").replace(" ", "").split(",") if arguments else ():
        key, equals, value = argument.partition("=")
        where = f"--set optim_args={arguments}"
        if not (key and equals and value):
            raise OptionError(f"{where}: found {argument!r}; expected key=value with commas between them")
        if name not in ARGUMENTS:
            continue
        known = ARGUMENTS[name]
        if key not in known:
            raise OptionError(
                f"{where}: {key!r} with the optimizer {name}, which takes {', '.join(known) or 'no arguments'}",
                did_you_mean(key, known) or "leave it out",
            )
        if not _is_right(key, value):
            expected = "true or false" if key in TRUTH_VALUES else "a number"
            raise OptionError(f"{where}: {key} {value}; expected {expected}")


def _is_right(key: str, value: str) -> bool:
    if key in TRUTH_VALUES:
        return value.lower() in ("true", "false", "yes", "no", "1", "0")
    try:
        return float(value) >= 0
    except ValueError:
        return False
