"""A process that renders chat templates and nothing else, so that a hostile or hopeless template can be killed.

Started by server.helper_pool; imports jinja2 and the standard library. Knows no files, tokens or HTTP.
In: JSON {"template", "variables"}. Out: a byte (+ rendered, ! the template raised, - it failed, * limit), UTF-8 text.

Templates are rendered as Hugging Face's transformers does it: the immutable sandbox, trim_blocks, lstrip_blocks, loop
controls, `tojson` that keeps order and non-ASCII, `raise_exception`, `strftime_now`, and a `generation` block that only
marks its content. As there, `dict` and `namespace` are narrowed so that neither leads to Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from server.helper_process import answer_frames, set_limits

MEMORY_BYTES = 256 << 20  # address space of this process
CPU_SECONDS = 3  # per rendering
MAX_OUTPUT = 4 << 20  # characters


class _Raised(jinja2.TemplateError):
    """The template itself called raise_exception."""


class _TooLong(Exception):
    """The output passed MAX_OUTPUT."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: where training code finds the assistant's text; here only a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace holds no names that begin with an underscore")


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise _Raised(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    helpers = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    env.globals.update(helpers, dict=_Dict(), namespace=_Namespace)
    return env


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    return environment().from_string(text)


def render(template: str, variables: dict[str, Any]) -> str:
    """Raises whatever the template provokes."""
    parts, length = [], 0
    for part in _compiled(template).generate(variables):
        length += len(part)
        if length > MAX_OUTPUT:
            raise _TooLong
        parts.append(part)
    return "".join(parts)


def _answer(frame: bytes) -> bytes:
    status, text = _rendered(frame)
    return status + text.encode("utf-8", "replace")


def _rendered(frame: bytes) -> tuple[bytes, str]:
    try:
        job = json.loads(frame)
        text = render(job["template"], job["variables"])
        text.encode()
        return b"+", text
    except _Raised as error:
        return b"!", str(error.message)
    except _TooLong:
        return b"*", f"it wrote more than {MAX_OUTPUT} characters"
    except (MemoryError, OverflowError):
        return b"*", "it needed more memory than it may have"
    except RecursionError:
        return b"*", "it called itself too often"
    except Exception as error:
        return b"-", f"{type(error).__name__}: {error}"


def main() -> None:
    """Answer frames until stdin closes."""
    set_limits(MEMORY_BYTES)
    render("{{ strftime_now('%Y') }}{{ messages | tojson }}", {"messages": []})  # what is imported late is imported now
    answer_frames(_answer, CPU_SECONDS)
