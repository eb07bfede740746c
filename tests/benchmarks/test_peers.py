"""Comparing servers: the checkpoint that all are given, how they are started and stopped, and the ratios."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import compare
from benchmarks.peers.checkpoint import write_checkpoint
from benchmarks.peers.compare import SERVERS, Case, Place, Server, running, table
from engine.llm import LLM
from engine.messages import SamplingParams

ROOT = Path(__file__).parents[2]
STUB = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = body["model"] == sys.argv[2]
        if body.get("stream"):
            event = "data: " + json.dumps({"choices": [{"text": " x"}]}) + "\\n\\n"
            text = event * body["max_tokens"]
        else:
            text = "{}"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_all_servers_get_the_weights_that_dummy_draws_and_a_tokenizer_that_transformers_takes(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_checkpoint("tiny", folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = AutoTokenizer.from_pretrained(folder)(" the of what")["input_ids"]
    assert len(ids) == 3
    options = {"device": "cpu", "dtype": "float32", "kernels": "torch", "max_context": 64}
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    tokens = LLM(folder, **options).generate([ids], params)[0].tokens
    assert LLM(folder, load_format="dummy", **options).generate([ids], params)[0].tokens == tokens
    assert model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 3:].tolist() == tokens


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_is_bound_to_loopback_and_its_port(name: str, tmp_path: Path) -> None:
    server = SERVERS[name](Place(tmp_path / "peers", tmp_path / "model", 3), "", 8123)
    assert "8123" in server.command
    assert name == "penstock" or server.command[server.command.index("--host") + 1] == "127.0.0.1"
    assert any(str(tmp_path / "model") in part for part in server.command)
    assert server.takes_ignore_eos == (name != "transformers")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """A server whose name for the model is the folder's."""
    monkeypatch.setitem(
        SERVERS, "stub", lambda place, kind, port: Server([sys.executable, "-c", STUB, str(port), str(place.model)])
    )
    return Place(tmp_path, tmp_path / "m", 1)


def test_a_server_is_started_loaded_under_its_own_name_for_the_model_and_stopped(stub: Place, tmp_path: Path) -> None:
    with running("stub-x", stub, tmp_path / "log") as server:
        assert server.model == str(stub.model)
        assert server.first_token > 0
        figures = compare.load(server, Case(2, 4, 5, 3), seed=1)
        assert (figures["errors"], figures["requests"]) == (0, 4)
        assert figures["server_memory_mib"] > 1
    assert not Path(f"/proc/{server.pid}/cmdline").exists()


def test_a_server_that_dies_is_reported_with_its_last_words(
    stub: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SERVERS, "stub", lambda *_: Server([sys.executable, "-c", "exit('no such luck')"]))
    with pytest.raises(RuntimeError, match="no such luck"), running("stub", stub, tmp_path / "log"):
        pass


def test_ratios_are_of_medians_and_errors_are_shown() -> None:
    def run(speed: float, errors: int = 0) -> dict[str, Any]:
        return dict.fromkeys(compare.SHOWN, 1.0) | {
            "output_tok_per_s": speed, "errors": errors, "first_error": "HTTP 500" if errors else None
        }  # fmt: skip

    runs = {"ours": [run(30), run(10), run(20)], "theirs": [run(8), run(9), run(10, 2)], "dead": [run(0, 9)] * 3}
    floor = {"output_tok_per_s": 40.0, "ttft_ms": 1.0, "tpot_ms": 1.0}
    lines = table(Case(8, 8, 128, 64), runs, floor)
    by_name = {line.split()[0]: line for line in lines[2:]}
    assert by_name["ours"].endswith(" 1.00")
    assert "10.0-30.0" in by_name["ours"]
    assert re.search(r"2\.22  2 errors: HTTP 500$", by_name["theirs"])
    assert re.search(r" -  27 errors", by_name["dead"])
    assert by_name["floor"].endswith(" 0.50")
    assert not any(line.startswith("floor") for line in table(Case(1, 1, 9, 9, 8), runs, floor))


def test_a_case_is_four_numbers_or_five() -> None:
    assert Case.parse("1:5:1024:8:1016") == Case(1, 5, 1024, 8, 1016)
    for wrong in ("1:2:3", "0:1:1:1", "1:1:1:1:1:1"):
        with pytest.raises(ValueError, match="shared prefix"):
            Case.parse(wrong)


def test_the_installer_is_sound_and_names_what_it_knows(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "peers" / "install.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(["bash", script, str(tmp_path), "ollama"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "llama, transformers, vllm" in done.stderr
