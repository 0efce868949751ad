"""A checkpoint's chat template, rendered in jinja2's sandbox with the settings of transformers.

    python -c "from minem.model.chat_template import *; print(render('{{ name | upper }}', {'name': 'em'}))"

The sandbox keeps a template from files, Python's internals and its input; it bounds neither time nor memory.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minem.errors import UserError, reason

# Llama 3.2's template prints today's date unless it gets one. A run must not depend on the day, so the clock of
# templates stands still at the date that this template falls back to.
TEMPLATE_DATE = datetime(2024, 7, 26)


def render(source: str, context: Mapping[str, Any]) -> str:
    """The text that a template prints for `context`. UserError begins with a verb: the caller names the template."""
    try:
        template = _compile(source)
    except Exception as error:
        raise UserError(f"cannot be read: {reason(error)}") from error
    try:
        return template.render(**context)
    except Exception as error:  # a template can raise anything that Python's operators raise
        raise UserError(f"fails on this chat: {reason(error)}") from error


@lru_cache(maxsize=64)
def variables(source: str) -> set[str]:
    """The names that a template leaves to `context`. UserError as of `render`."""
    try:
        return meta.find_undeclared_variables(_environment().parse(source))
    except jinja2.TemplateError as error:
        raise UserError(f"cannot be read: {reason(error)}") from error


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [_GenerationBlock, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
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
        return jinja2.nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
