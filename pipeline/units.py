"""Numbers with their units, as people read them. Imports nothing."""


def size(n_bytes: int | float) -> str:
    """A number of bytes for people.

    >>> size(512), size(461_373_440)
    ('512 B', '461.4 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"
