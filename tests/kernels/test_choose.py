"""One implementation per operation, chosen once; importing the package costs nothing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import OPERATIONS, choose, definitions

ROOT = Path(__file__).parents[2]


def python(program: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("device", "requested", "name"),
    [("cuda", "auto", "triton"), ("cuda", "triton", "triton"), ("cuda", "torch", "torch"), ("cpu", "torch", "torch")],
)
def test_the_choice(device: str, requested: str, name: str) -> None:
    chosen = choose(device, requested)
    assert chosen.name == name
    assert all(callable(getattr(chosen, operation)) for operation in OPERATIONS)


def test_a_cpu_runs_its_compiled_form() -> None:
    assert choose("cpu").name == "cpu"


@pytest.mark.parametrize(
    ("device", "requested"), [("cpu", "triton"), ("cuda", "cpu"), ("cuda", "fast"), ("tpu", "auto")]
)
def test_what_cannot_be_is_refused_with_the_way_out(device: str, requested: str) -> None:
    with pytest.raises(ValueError, match=r"choose one of|known devices"):
        choose(device, requested)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forms_take_what_the_definition_takes(device: str, operation: str) -> None:
    form, definition = (inspect.signature(getattr(k, operation)) for k in (choose(device), definitions()))
    assert [p.name for p in form.parameters.values()] == [p.name for p in definition.parameters.values()]


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, kernels; print([m for m in ('torch', 'triton', 'numba', 'numpy') if m in sys.modules])"
    assert python(program) == "[]"


def test_the_definitions_serve_where_triton_is_not_installed() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch
from kernels import choose
print(choose("cuda", "torch").activation(torch.ones(1, 2)).shape)
"""
    assert python(program) == "torch.Size([1, 1])"
