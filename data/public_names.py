"""Names in what people publish: a page or a card shows names of the Hub whole, and hides folders of this machine."""


def public_name(name: str) -> str:
    """A name of the Hub as it is; of a path or a URL, the last part: the folders before it may be private."""
    is_place = name.startswith(("/", ".", "~")) or "://" in name or name.count("/") > 1
    return last_part(name) if is_place else name


def last_part(path: str) -> str:
    """The last part of a path or a URL."""
    return path.rstrip("/").rpartition("/")[2] or path
