"""A user's own code by name: `--sampler module:Class`, `--verdict module:function`.

minem train --verdict mine:verdict        # the function `verdict` of mine.py in this folder
"""

import hashlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

from minem.errors import UserError, shown

VERDICTS = tuple(f"minem.data.verdict:{name}" for name in ("strict", "flexible", "number"))  # a file may name these


def import_object(name: str, key: str, known: str = "") -> Any:
    """What "module:attribute" under a config key names, or a UserError. known: the built-in names, with commas."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        choices = f"one of {known}, or " if known else ""
        raise UserError(f"{key} = {name!r} must be {choices}your own as module:name")
    if os.getcwd() not in sys.path:  # a console script, unlike `python -m`, does not look into the current folder
        sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UserError(f"{key} = {name!r} cannot be imported ({error!r})") from error


def hash_source(name: str) -> str:
    """SHA-256 of the file that the module of "module:name" was imported from; "" where it has none."""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def check_origin(key: str, name: str, origin: str, flag: str) -> None:
    """Refuse code that a config file names, unless it is one of minem's verdicts or lies in the current folder.

    A file may come from anyone. With `shutil:rmtree` for an answer check it would delete what a model names, and with
    `minem.files:write_rows` overwrite it.
    """
    if key == "task.verdict" and name in VERDICTS:
        return
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    place = Path.cwd().joinpath(*module.split("."))
    here = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
    if top == "minem" or top in sys.stdlib_module_names or not here:
        advice = f"a config may not run code from elsewhere: if you trust it, give {flag} {name} on the command line"
        raise UserError(f"{origin}: {key} is {shown(name)}, which is no code of this folder; {advice}")
