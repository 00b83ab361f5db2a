"""Writes the repository's address into README.md and pyproject.toml, as PyPI needs it.

    python .ci/addresses.py ADDRESS TAG

The release workflow does this in its own checkout before it builds. README's links stay relative in the repository:
they work in every copy of it.
"""

import re
import sys
from pathlib import Path

RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)")
PICTURES = {".gif", ".jpg", ".png", ".svg"}
URLS = re.compile(r"^\[project\.urls\].*\n", re.MULTILINE)


def main() -> None:
    address, tag = sys.argv[1:]
    readme, pyproject = Path("README.md"), Path("pyproject.toml")
    readme.write_text(RELATIVE_LINK.sub(lambda link: f"]({absolute(link[1], address, tag)}", readme.read_text()))
    urls = f'Repository = "{address}"\nIssues = "{address}/issues"\nChangelog = "{address}/blob/{tag}/CHANGELOG.md"\n'
    content, tables = URLS.subn(lambda table: table[0] + urls, pyproject.read_text())
    if tables != 1:
        sys.exit(f"pyproject.toml: {tables} tables [project.urls]; expected one")
    pyproject.write_text(content)


def absolute(path: str, address: str, tag: str) -> str:
    """Where a file of the repository is shown, or a picture is had."""
    kind = "raw" if Path(path).suffix in PICTURES else "blob"
    return f"{address}/{kind}/{tag}/{path.removeprefix('./')}"


if __name__ == "__main__":
    main()
