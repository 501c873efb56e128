"""Renders a checkpoint's chat template: a program by strangers, so it runs in a process of its own, with limits.

The environment is that of transformers (Jinja's immutable sandbox, the same trimming, filters and tags), so
that a template gives here what `apply_chat_template` gives. Not covered: what a template does to arguments
that a SmolVLM chat never has (tools, documents).
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CPU_SECONDS = 10  # an honest template takes a millisecond
MEMORY_BYTES = 1 << 30
WAIT_SECONDS = 60  # on a busy machine
CHILD = "import runpy, sys; runpy.run_path(sys.argv[1])['child']()"
MAX_CHARACTERS = 1 << 20  # of one rendered chat


class TemplateError(ValueError):
    """A template that cannot be rendered; the message says why."""


def render(template: str, chats: Sequence[Mapping[str, Any]], cpu_seconds: int = CPU_SECONDS) -> list[str]:
    """The text of each chat.

    Args:
        template: Jinja source.
        chats: the template's variables (`messages`, `add_generation_prompt`, ...) for each, as JSON holds them.
        cpu_seconds: at most this much processor time for all of them.

    Raises:
        TemplateError: if it is no template, refuses a chat, or takes too long or too much memory.
    """
    request = json.dumps({"template": template, "chats": list(chats), "cpu_seconds": cpu_seconds})
    try:
        done = subprocess.run(  # noqa: S603  # this file, by this interpreter
            [sys.executable, "-P", "-c", CHILD, str(Path(__file__).resolve())],
            input=request.encode(),
            capture_output=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise TemplateError(f"takes more than {WAIT_SECONDS} s") from exc
    try:
        answer = json.loads(done.stdout)
    except ValueError as exc:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise TemplateError(f"exceeds {cpu_seconds} s or {MEMORY_BYTES >> 20} MiB ({lines[-1]:.200})") from exc
    if "error" in answer:
        raise TemplateError(answer["error"])
    texts: list[str] = answer["texts"]
    return texts


# ---- the child


def limit(cpu_seconds: int) -> None:
    """Caps this process's processor time, memory and files, where the system can."""
    import resource

    limits = ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0))
    for kind, most in limits:
        with suppress(ValueError, OSError):  # macOS has no limit on addresses
            resource.setrlimit(kind, (most, most))


def environment() -> Any:
    """transformers' Jinja environment."""
    from datetime import datetime

    from jinja2 import TemplateError as JinjaError
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant says; its content is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012  # as the base class declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PublicNamespace(Namespace):
        """A namespace whose names cannot reach into Python."""

        def __init__(*args: Any, **names: Any) -> None:  # `self` may be one of the names
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **names).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace has no place for {name}")
            Namespace.__setitem__(self, name, value)

    def refuse(message: str) -> None:
        raise JinjaError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005  # as transformers does
    made.globals["namespace"] = PublicNamespace
    return made


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"texts": [...]} or {"error": why}."""
    texts: list[str] = []
    try:
        template = environment().from_string(request["template"])
        for chat in request["chats"]:
            pieces, size = [], 0
            for piece in template.generate(**chat):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    return {"error": f"gives more than {MAX_CHARACTERS:,} characters"}
            texts.append("".join(pieces))
    except Exception as exc:  # noqa: BLE001  # a template can run into any error of Python's
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"texts": texts}


def child() -> None:
    """Reads one request, writes one answer."""
    request = json.load(sys.stdin)
    limit(request["cpu_seconds"])
    print(json.dumps(answer(request)))
