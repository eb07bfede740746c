"""Jinja chat templates for models that ship none, one per family; which model gets which is decided in server/."""

from __future__ import annotations

from pathlib import Path

NAMES = ("chatml", "gemma", "llama2", "llama3", "mistral", "phi3", "zephyr")


def read(name: str) -> str:
    """The template of a family in NAMES."""
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
