"""The one error shape."""

from __future__ import annotations

import orjson
import pytest

from server.errors import ENGINE_FAULTS, RequestError, engine_fault, error_body, safe_name
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (415, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error"),
     (503, "server_error")],
)  # fmt: skip
def test_the_body_is_openais(status, kind):
    error = RequestError(status, code="a_code", message="What and what to do.", param="n")
    expected = {"message": "What and what to do.", "type": kind, "param": "n", "code": "a_code"}
    assert orjson.loads(error_body(error)) == {"error": expected}


def test_every_code_of_the_client_and_the_engine_has_its_sentence():
    from server.engine_client import CRASHED_TWICE, UNAVAILABLE

    assert {CRASHED_TWICE, UNAVAILABLE, "model_produced_nan", "internal_error", "out_of_memory"} <= ENGINE_FAULTS.keys()
    assert engine_fault("never heard of").code == "internal_error"


@pytest.mark.parametrize("text", ["a b", "<x>", "x" * 129, "", "é", 5, None, "a\n"])
def test_only_short_plain_names_are_repeated(text):
    assert safe_name(text) is None


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_refusal_says_a_way_out(model):
    for name, entry in model.refused.items():
        assert len(entry.way_out) > 8, name
        assert not entry.way_out.endswith("."), name
