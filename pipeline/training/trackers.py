"""The experiment trackers of ``--report-to``. Imports no torch."""

from importlib.util import find_spec

from adpa.errors import OptionError, did_you_mean

# The trackers of transformers, each with the packages that it imports, by the name under which pip installs them.
TRACKERS: dict[str, dict[str, str]] = {
    "azure_ml": {"azureml": "azureml-core"},
    "clearml": {"clearml": "clearml"},
    "codecarbon": {"codecarbon": "codecarbon"},
    "comet_ml": {"comet_ml": "comet-ml"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "dvclive": {"dvclive": "dvclive"},
    "flyte": {"flytekit": "flytekit"},
    "kubeflow": {},
    "mlflow": {"mlflow": "mlflow"},
    "neptune": {"neptune": "neptune"},
    "swanlab": {"swanlab": "swanlab"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "trackio": {"trackio": "trackio"},
    "wandb": {"wandb": "wandb"},
}
NONE, ALL = "none", "all"
INSTEAD = {"tensorboard": "tensorboardX"}  # a package that does as well


def read_trackers(report_to: str) -> list[str]:
    """The trackers that ``--report-to`` names, with commas between them; ``none`` alone for none.

    Raises:
        OptionError: a tracker is unknown or not installed, or ``none`` or ``all`` is beside others.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in report_to.split(",")))
    for name in names:
        if name in (NONE, ALL) and len(names) > 1:
            raise OptionError(f"--report-to {report_to}: {name} beside others", f"leave {name} out, or name it alone")
        if name in (NONE, ALL):
            continue
        if name not in TRACKERS:
            known = (NONE, ALL, *TRACKERS)
            nearest = did_you_mean(name, known)
            listed = "" if nearest else f"; expected some of {', '.join(known)}"
            raise OptionError(f"--report-to {report_to or repr(report_to)}: no tracker {name!r}{listed}", nearest)
        missing = [
            to_install
            for package, to_install in TRACKERS[name].items()
            if find_spec(package) is None and find_spec(INSTEAD.get(package, package)) is None
        ]
        if missing:
            raise OptionError(
                f"--report-to {name} needs {missing[0]}, which is not installed", f"pip install {' '.join(missing)}"
            )
    return [] if names == [NONE] else names
