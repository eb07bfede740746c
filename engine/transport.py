"""The engine's end of the socket: whole messages in and out, from the step loop's one thread.

Knows framing and waiting; knows nothing of what the messages mean. Writes cannot deadlock: bytes that the socket does
not take stay in a bounded buffer, and waiting for room there goes on reading, so the API's writes always move.
"""

from __future__ import annotations

import select
import socket

from engine.messages import Frames, FromEngine, ToEngine, decode_to_engine, encode

READ_BYTES = 1 << 20  # at most so much is read between two steps, so that a flood of requests cannot stop the steps
OUTGOING_BYTES = 8 << 20  # the API has not read for thousands of steps: the loop waits for it


class Link:
    """One connected stream socket. Every method raises ConnectionError once the other end is closed."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames = Frames()
        self._inbox: list[ToEngine] = []
        self._outgoing = bytearray()

    def send(self, message: FromEngine) -> None:
        """Hand over one message; waits only while more than OUTGOING_BYTES are unread."""
        self._outgoing += encode(message)
        self._write()
        while len(self._outgoing) > OUTGOING_BYTES:
            self._exchange(None)

    def receive(self, timeout: float | None = 0.0) -> list[ToEngine]:
        """The messages that have arrived, in order; waits at most `timeout` seconds (None: for ever) for the first."""
        self._exchange(0.0 if self._inbox else timeout)
        while timeout is None and not self._inbox:
            self._exchange(None)
        messages, self._inbox = self._inbox, []
        return messages

    def _exchange(self, timeout: float | None) -> None:
        """Wait until the socket has something or takes something, then move it."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        for _, events in poller.poll(None if timeout is None else timeout * 1000):
            if events & ~select.POLLOUT:
                self._read()
            if events & select.POLLOUT:
                self._write()

    def _read(self) -> None:
        data = self._sock.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the API process closed the socket")
        self._inbox += [decode_to_engine(body) for body in self._frames.feed(data)]

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            pass
