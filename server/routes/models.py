"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from server.auth import guard
from server.generate import check_model
from server.state import ServerState, server_state

router = APIRouter(dependencies=[Depends(guard)])


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models served here."""
    state = server_state(request)
    data = [_model(state, name) for name in state.model_names]
    return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    """One model; its name may hold slashes."""
    state = server_state(request)
    check_model(state, name)
    return Response(orjson.dumps(_model(state, name)), media_type="application/json")


def _model(state: ServerState, name: str) -> dict[str, Any]:
    ready = state.client.ready
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "penstock",
        "root": state.model_name,
        "parent": None,
        "max_model_len": None if ready is None else ready.max_context,
        "tool_parser": None if state.tools is None else state.tools.format.name,
        "reasoning_marks": None if state.marks is None else [state.marks.begin, state.marks.end],
    }
