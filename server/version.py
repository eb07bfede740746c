"""Which Penstock this is, from the one place that says so: the installed package's metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version; a bare checkout says so."""
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "0+source"
