"""Where a cache lies: a local directory, or the URL of an object store such as ``s3://bucket/folder``."""

import errno
import os
import re
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeAlias

from typing_extensions import TypeIs
from upath import UPath

from adpa.errors import OptionError

Location: TypeAlias = Path | UPath
NAME_MAX = 255  # bytes of a name in a folder, in all usual file systems
URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # a path has one of its two slashes
NO_BUCKET = re.compile(r"(?!memory|file)[a-z][a-z0-9+.-]+://(/|$)")
HIDING = 34  # more bytes, of the hidden name under which a file is written


def find_location(text: str) -> Location:
    """The location that a user named: a path, or the URL of anything that fsspec opens.

    Raises:
        OptionError: the URL's scheme is unknown, it names no bucket, or the package that opens it is not installed.
    """
    if "://" not in text:
        return Path(text)
    if NO_BUCKET.match(text):
        raise OptionError(f"{text}: names no bucket", "write s3://bucket/folder")
    try:
        location = UPath(text)
        local = "file" in location.fs.protocol
    except (ImportError, ValueError) as error:
        raise OptionError(
            f"{text}: cannot be opened: {error}", "name a directory, or s3://bucket/folder with pip install 'adpa[s3]'"
        ) from error
    return Path(location.path) if local else location


def is_local(location: Location) -> TypeIs[Path]:
    """Whether a location is in the file system: it can rename and link files, and has folders. Object stores cannot."""
    return isinstance(location, Path)


def copies_folder() -> Path:
    """Where local copies of an object store's files lie: ``$ADPA_HOME/files``. Users may delete it at any time."""
    return Path(os.environ.get("ADPA_HOME") or Path.home() / ".cache" / "adpa") / "files"


def check_name(option: str, path: Location, longest: int = NAME_MAX) -> None:
    """Checks that a path can exist: no name in it is longer than ``longest`` bytes, and its folders can be entered.

    One that was a URL before it became a path is refused: a folder of the name ``s3:`` is what nobody wants.

    Raises:
        OptionError: naming the option.
    """
    if not is_local(path):
        return
    text = str(path)
    shown = text if text.isprintable() else ascii(text)
    if URL.match(text) and not os.path.lexists(path.parts[0]):
        url = "write both slashes of a URL, and in Python UPath('s3://bucket/folder')"
        fix = url if option == "--cache" else "name a file or directory of this machine"
        raise OptionError(f"{option} {shown}: not a local path", fix)
    try:
        if any(len(os.fsencode(part)) > longest for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"{option} {shown}: {reason}", "name another place") from error


def check_writable(option: str, directory: Location) -> None:
    """Checks that a directory can be written, or made if it does not exist. An object store reports this when written.

    Raises:
        OptionError: naming the option.
    """
    check_name(option, directory)
    if not is_local(directory):
        return
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not os.path.exists(nearest):
        problem = "is a broken link"
    elif not nearest.is_dir():
        problem = "is not a directory"
    elif not _can_write(nearest):
        problem = "cannot be written"
    else:
        return
    subject = "it" if nearest == directory else nearest
    raise OptionError(f"{option} {directory}: {subject} {problem}", "name another directory")


def check_outside(option: str, path: Location, cache: Location) -> None:
    """Checks that a file or directory of a command does not lie in a cache, nor is the cache.

    Raises:
        OptionError: naming the option.
    """
    check_name(option, path)
    if is_local(path) and is_local(cache) and cache.resolve() in (path.resolve(), *path.resolve().parents):
        raise OptionError(f"{option} {path}: lies in the cache {cache}", "name a place outside of it")


def check_writable_file(option: str, file: Path) -> None:
    """Checks that a file can be written: a new one into an existing directory, or one that is there.

    Raises:
        OptionError: naming the option.
    """
    check_name(option, file, NAME_MAX - HIDING)
    if file.exists():
        writable = not file.is_dir() and os.access(file, os.W_OK)
    else:
        writable = file.parent.is_dir() and not file.is_symlink()
    if not writable or (not is_special(file) and not _can_write(file.resolve().parent)):
        raise OptionError(f"{option} {file}: cannot be written there", "name a file in an existing directory")


def check_other_file(option: str, file: Path, other: str, path: Path, is_read: bool) -> None:
    """Checks that a file that is written is not the place of another option, nor a file that the other option reads.

    Args:
        option: the option that names the file.
        file: the file.
        other: the other option.
        path: its file or directory.
        is_read: whether it is read, with the files in it.

    Raises:
        OptionError: naming both options.
    """
    same = file.samefile(path) if file.exists() and path.exists() else file.resolve() == path.resolve()
    if same and not is_special(file):
        raise OptionError(f"{option} {file}: {other} names it too", "name another file")
    if is_read and file.exists() and path.resolve() in file.resolve().parents:
        raise OptionError(f"{option} {file}: one of the files of {other} {path}", "name a new file")


def is_special(file: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/null: it is written, and not replaced."""
    return file.exists() and not file.is_file() and not file.is_dir()


def _can_write(folder: Path) -> bool:
    """Tries it with a file that has no name: permissions alone do not tell of every file system."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
