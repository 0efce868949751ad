"""A checkpoint's chat template, rendered where it can do no harm: in a process of its own, short of time and memory.

    python -c "from minem.model.chat_template import *; print(render('{{ name | upper }}', {'name': 'em'}))"

A template is a stranger's program. jinja2's sandbox keeps it from files and from Python's insides, but not from running
for ever (`{% for %}` within `{% for %}`) or from filling the memory (`'a' * 10**10`, a filter that pads to a width, a
text doubled forty times). Those are no list that one could write guards for, so the kernel is the guard: the process
has limits that no operation can step over, and being killed costs nothing but the sentence that says so. It starts with
the first chat, lives as long as its template is in use (a chat then takes some 0.1 ms), gets no environment and so no
secrets, and may not write a file.

The process is this same file: `python -m minem.model.chat_template`, one JSON line in, one JSON line out.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NoReturn

import jinja2
import markupsafe
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

import minem
from minem.errors import UserError

RENDER_LIMIT = 4 << 20  # characters of one rendered chat
MEMORY_LIMIT = 512 << 20  # bytes of address space of the process
SECONDS = 5.0  # of processor time for one chat; real templates take a thousandth of it
ANSWER_LIMIT = 16 * RENDER_LIMIT  # bytes of a line: JSON writes a character in twelve at the most
# Llama 3.2's template prints today's date, unless it is told one; a run must not depend on the day it was started, so
# the clock that templates see stands still, on the date which that template itself falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)


def render(source: str, context: Mapping[str, Any]) -> str:
    """What the template `source` prints for the variables in `context` (JSON values).

    Raises:
        UserError: the template cannot be read, fails, or steps over a limit. The sentence begins with a verb, for the
            caller to say whose template it is.
    """
    return _process(source).render(context)


class _Process:
    """The process of one template, begun with the first chat and again after a template has broken it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.child: subprocess.Popen[bytes] | None = None

    def render(self, context: Mapping[str, Any]) -> str:
        lines = [_line(context)]
        if self.child is None:
            self.child = _start()
            weakref.finalize(self, _stop, self.child)
            limits = {"source": self.source, "seconds": SECONDS, "memory": MEMORY_LIMIT, "characters": RENDER_LIMIT}
            lines.insert(0, _line(limits))
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.writelines(lines)
            self.child.stdin.flush()
            answer = self.child.stdout.readline(ANSWER_LIMIT)
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C in a notebook: what it still answers would be taken for the next chat
            child, self.child = self.child, None
            _stop(child)
            raise
        if not answer.endswith(b"\n"):
            child, self.child = self.child, None
            raise UserError(_why_it_died(_stop(child, patience=10.0)))
        told = json.loads(answer)
        if "failed" in told:
            raise UserError(told["failed"])
        return str(told["text"])


# One process per template, which tokenizers of the same model share; a template that is out of use loses its own.
_process = lru_cache(maxsize=4)(_Process)


def _start() -> subprocess.Popen[bytes]:
    # What Python needs to find the same packages, and nothing else: the environment holds the user's tokens.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment["PYTHONHASHSEED"] = "0"
    homes = (str(Path(str(package.__file__)).parents[1]) for package in (minem, jinja2, markupsafe))
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(homes))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "minem.model.chat_template"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for minem to answer
    )


def _stop(child: subprocess.Popen[bytes], patience: float = 0.0) -> int:
    """See that the process has ended, and say how."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience)
    child.kill()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # what could not be written any more
            pipe.close()  # type: ignore[union-attr]
    return child.wait()


def _why_it_died(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} seconds of processor time for one chat"
    return f"broke the process that renders it (status {status})"


def _line(value: Any) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


# ------------------------------------------------------------------------------------------- inside the process


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    limits = json.loads(requests.readline())
    _restrict(limits["memory"])
    template: jinja2.Template | None = None
    for line in requests:
        # From here to the answer, the kernel kills the process when the time is up, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        try:
            template = template or _environment().from_string(limits["source"])
            answer = _attempt(template, json.loads(line), limits["characters"])
        except MemoryError:
            answer = {"failed": f"needs more than {limits['memory'] >> 20} MiB of memory"}
        except Exception as error:
            answer = {"failed": f"cannot be read: {_one_line(error)}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_line(answer))
        answers.flush()


def _attempt(template: jinja2.Template, context: dict[str, Any], limit: int) -> dict[str, str]:
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**context):
            length += len(piece)
            if length > limit:
                return {"failed": f"prints more than {limit} characters"}
            pieces.append(piece)
    except MemoryError:
        raise
    except Exception as error:  # whatever it does wrong is its own fault
        return {"failed": f"fails on this chat: {_one_line(error)}"}
    return {"text": "".join(pieces)}


def _restrict(memory: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(what, (most, most))


def _environment() -> ImmutableSandboxedEnvironment:
    """transformers' own settings for chat templates, but for the clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks an assistant's words for training masks; here it just prints."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error)[:10_000].split())[:300] or type(error).__name__


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
