"""The command itself, as a child process where its imports matter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server import cli

ROOT = Path(__file__).parent.parent.parent


def penstock(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "server", *argv], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom server.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'pydantic', 'tokenizers', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "PENSTOCK_MAX_QUEUE" in done.stdout.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["serve", "--max-model-len", "5"], "--max-context"),
        (["serve", "--prt", "5"], "--port"),
        (["serve", "--port", "x"], "--port"),
        (["srve"], "serve"),
        (["convert", "/nowhere.gguf", "/tmp/never-made"], "nowhere.gguf"),
    ],
)
def test_a_misuse_is_answered_in_six_lines_without_a_traceback(argv: list[str], told: str) -> None:
    done = penstock(*argv)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 6


def test_config_shows_each_option_with_its_source_and_hides_keys() -> None:
    done = penstock("config", "--port", "81", "--api-key", "very-secret")
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows["--port"].split()[1:] == ["81", "--port"]
    assert rows["--max-queue"].endswith("default")
    assert "very-secret" not in done.stdout


def test_somebody_elses_kernels_package_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    assert cli.foreign_packages() is None
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    complaint = cli.foreign_packages()
    assert complaint is not None
    assert "kernels" in complaint
    assert str(tmp_path) in complaint


def test_transformers_does_not_take_our_kernels_for_hugging_faces() -> None:
    """transformers looks for a package `kernels`; ours must be reported as unavailable, and transformers must run."""
    code = (
        "import kernels\nfrom transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
