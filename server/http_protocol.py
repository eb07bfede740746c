"""uvicorn's h11 protocol, hardened: header timeout, size and count limits, no ambiguous framing, no reader too slow.

Knows sockets and HTTP/1.1 framing; not paths, bodies or what is served. h11 rather than httptools because it refuses
malformed requests strictly; the traffic of an LLM is not bound by header parsing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import h11
from starlette.types import Message
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.errors import RequestError, error_body

if TYPE_CHECKING:
    from server.settings import Settings

MAX_HEADER_BYTES = 64 * 1024  # of one request: names, values and request line
MAX_HEADERS = 100
SEND_BODY = "send_body"  # in scope["state"]: a `send` for the messages of a body
SLOW_READER = "penstock.slow_reader"  # set in the scope when the client did not read for --send-timeout


class CheckedConnection(h11.Connection):
    """An h11 connection that also refuses what h11 lets through; `fault` is why it refused."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self.fault: h11.RemoteProtocolError | None = None
        self.is_chunked = False  # the answer being sent

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        """Bytes for the socket; notes whether an answer's body goes out in chunks."""
        data = super().send(event)
        if type(event) is h11.Response:
            self.is_chunked = data is not None and b"\r\ntransfer-encoding: chunked\r\n" in data.lower()
        return data

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event; raises RemoteProtocolError with a status hint."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event


def _check(request: h11.Request) -> None:
    headers = list(request.headers)
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in headers)
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("unknown version", error_status_hint=400)
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length", error_status_hint=400)


class HttpProtocol(H11Protocol):
    """One connection. A subclass with the settings' times is made by `protocol_class`."""

    header_timeout = 10.0
    send_timeout = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: CheckedConnection = CheckedConnection()
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, SEND_BODY: self._send_body}  # copied into each request's scope["state"]

    async def _send_body(self, message: Message) -> None:
        """ASGI's send once an answer has begun. A chunk within a body changes no state, so it goes past h11."""
        cycle, data = self.cycle, message["body"]
        assert cycle is not None
        if not (data and message["more_body"] and self.conn.is_chunked) or cycle.response_complete:
            await cycle.send(cast(Any, message))
            return
        if self.flow.write_paused and not cycle.disconnected:
            await self.flow.drain()
        if not cycle.disconnected:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection owes us its first headers."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._headers_came()
        self._caught_up()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More bytes; once a request has begun it has `header_timeout` seconds to finish its headers."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._headers_came()
        elif self._headers_due is None and self.conn.trailing_data[0]:
            self._expect_headers()

    def pause_writing(self) -> None:
        """The client reads slower than we write: it has `send_timeout` seconds to catch up."""
        super().pause_writing()
        self._reading_due = self._reading_due or self.loop.call_later(self.send_timeout, self._drop_slow_reader)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._caught_up()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that broke the protocol, in the one error shape, and close."""
        hint = self.conn.fault.error_status_hint if self.conn.fault is not None else 400
        message = {
            431: f"The headers are larger than {MAX_HEADER_BYTES} bytes or more than {MAX_HEADERS}. Send fewer.",
            408: f"The headers did not come within {self.header_timeout:g} s (--header-timeout). Send them again.",
        }.get(hint, "The request is not valid HTTP/1.1.")
        self._refuse(RequestError(hint if hint in (408, 431) else 400, code="invalid_http", message=message))

    def _refuse(self, error: RequestError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun: only closing is left
            body = error_body(error)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(self.header_timeout, self._headers_overdue)

    def _headers_came(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_overdue(self) -> None:
        if not self.transport.is_closing():
            self.conn.fault = h11.RemoteProtocolError("headers overdue", error_status_hint=408)
            self.send_400_response("")

    def _caught_up(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _drop_slow_reader(self) -> None:
        if self.scope is not None:
            cast(dict[str, Any], self.scope)[SLOW_READER] = True
        self.transport.abort()


def protocol_class(settings: Settings) -> type[HttpProtocol]:
    """For uvicorn's `Config(http=...)`."""
    times = {"header_timeout": settings.header_timeout, "send_timeout": settings.send_timeout}
    return type("SettingsHttpProtocol", (HttpProtocol,), times)
