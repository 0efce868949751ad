"""How a command ends: errors become one sentence and an exit code, signals stop it, misspelt names are explained.

minem trian; echo $?        # there is no command 'trian'; did you mean 'train'? ... 2
"""

import difflib
import errno
import io
import os
import re
import sys
from typing import Any, NoReturn

import click

from minem.errors import Interrupted, MinemError
from minem.files import is_full
from minem.parallel.signals import stopped
from minem.text import sentence

# A path that the user gave, and that is no place of that kind.
NO_PLACE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.ELOOP)


class Commands(click.Group):
    """Turns minem's own errors into one sentence and an exit code, and names the nearest command for a misspelt one."""

    def main(self, *args: Any, **more: Any) -> Any:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if getattr(sys, name) is None:  # closed: the next file that a run opens would become its stderr
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # this takes the lowest free number
                setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
        return super().main(*args, **more)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"there is no command {args[0]!r}; {advice}") from error

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # the help
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _refuse(ctx, error)
        except OSError as error:  # from printing the help
            _unprinted(ctx, error)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 gets escapes and no traceback
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except click.UsageError as error:
            _refuse(ctx, error)
        except MinemError as error:
            click.echo(f"minem: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            _unprinted(ctx, error)
        except ModuleNotFoundError as error:
            if (error.name or "minem").startswith("minem"):
                raise
            click.echo(f"minem: the package {error.name} is not installed here: pip install {error.name}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo(stopped(ctx.invoked_subcommand), err=True)
            ctx.exit(Interrupted.exit_code)


def _unprinted(ctx: click.Context, error: OSError) -> NoReturn:
    """End after a failed print: quietly if its reader left, as `head` does, else with a sentence; others are bugs."""
    if error.filename is not None and error.errno in NO_PLACE:
        click.echo(f"minem: {sentence(str(error.filename))} cannot be used: {error.strerror}", err=True)
        ctx.exit(2)
    if error.filename is not None or not (isinstance(error, BrokenPipeError) or is_full(error)):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer
    if isinstance(error, BrokenPipeError):
        ctx.exit(0)
    click.echo(f"minem: the output cannot be written: {error.strerror}", err=True)
    ctx.exit(Interrupted.exit_code)


def _refuse(ctx: click.Context, error: click.UsageError) -> NoReturn:
    """click's complaint about a flag or a value in one sentence, with the nearest valid name if there is one."""
    ctx = error.ctx or ctx
    message, found, names = error.format_message().rstrip("."), "", []
    if isinstance(error, click.NoSuchOption):
        message, found = f"there is no flag {error.option_name}", error.option_name
        names = [name for param in ctx.command.get_params(ctx) for name in param.opts if name.startswith("--")]
    elif isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Choice):
        value = re.search(r": '(.*)' is not one of", message, re.DOTALL)
        found, names = value[1] if value else "", list(map(str, error.param.type.choices))
    near = difflib.get_close_matches(found, names, n=1)
    advice = f"did you mean {near[0]}?" if near else f"see {ctx.command_path} --help"
    click.echo(f"minem: {sentence(f'{message}; {advice}')}", err=True)
    ctx.exit(2)
