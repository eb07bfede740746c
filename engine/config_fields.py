"""Typed, bounded reads from a JSON object that nobody vouches for. Knows no model and no field's meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import CheckpointError


@dataclass(frozen=True)
class Fields:
    """A JSON object's values; null counts as absent. Errors name the file and the field."""

    values: dict[str, Any]
    where: str = "config.json"

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN and infinities fail the comparison
            raise self.fault(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.fault(name, value, "true or false")
        return value

    def choice(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.fault(name, value, f"one of {', '.join(known)}")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """Empty where it is absent."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.fault(name, value, "an object")
        return value

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        value = self._value(name, None)
        items = value if isinstance(value, list) else []
        if len(items) != count or not all(type(i) in (int, float) and low <= i <= high for i in items):
            raise self.fault(name, value, f"{count} numbers from {low:g} to {high:g}")
        return tuple(map(float, items))

    def choices(self, name: str, count: int, known: tuple[str, ...]) -> tuple[str, ...]:
        value = self._value(name, None)
        if not isinstance(value, list) or len(value) != count or any(item not in known for item in value):
            raise self.fault(name, value, f"{count} of {' or '.join(known)}")
        return tuple(value)

    def only(self, name: str, expected: Any, why: str) -> None:
        """The one value that is supported, which absence means too."""
        value = self._value(name, expected)
        if type(value) is not type(expected) or value != expected:
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; {why}.")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def without(self, *names: str) -> Fields:
        return replace(self, values={name: value for name, value in self.values.items() if name not in names})

    def renamed(self, names: Mapping[str, str]) -> Fields:
        """With a family's own names (the keys of `names`) beside what others call the same."""
        found = {ours: self.values[theirs] for theirs, ours in names.items() if theirs in self.values}
        return replace(self, values=self.values | found)

    def fault(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {shown(value)}; expected {expected}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {name} is missing.")
        return default if value is None else value


def shown(value: Any, limit: int = 80) -> str:
    """A value from a file that nobody vouches for, short and printable."""
    if type(value) is int and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    if isinstance(value, list | dict):
        return f"{type(value).__name__} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."
