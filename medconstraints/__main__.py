"""Every command of the package: `python -m medconstraints <command> --option value ...`; alone, it lists them.

A command is a function of keywords. Its options are read before it is called: one that it does not have, one given
twice, and a value of another kind end with exit status 2 and the reason as the last line.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import fire
from fire.core import FireExit
from fire.decorators import SetParseFns
from fire.parser import DefaultParseValue

__all__ = ["COMMANDS", "main", "read_command"]

PROGRAM = "python -m medconstraints"
# Where each command stands, imported when it is asked for, and what the list says of it.
COMMANDS = {
    "demo": (
        "medconstraints.demo:run_demo",
        "train on synthetic volumes with boxes only and report",
    ),
    "phantoms": ("medconstraints.synthetic.phantoms:make_cohort", "write a cohort of synthetic 3D volumes"),
    "discs": ("medconstraints.synthetic.discs:make_discs", "write a cohort of noisy 2D images of two discs"),
    "check_dataset": ("medconstraints.commands:check_dataset", "compare a local copy of a data set with its manifest"),
    "make_datalist": ("medconstraints.commands:make_datalist", "list the cases of a data set, divided by patient"),
    "fit_common_bounds": ("medconstraints.commands:fit_common_bounds", "fit one pair of size bounds for all images"),
    "fit_filling": ("medconstraints.commands:fit_filling", "fit how much of its boxes an organ fills"),
    "evaluation": ("medconstraints.commands:evaluation", "score saved masks against their references"),
    "report": ("medconstraints.commands:report", "write a page and a picture of scored masks"),
    "curves": ("medconstraints.commands:curves", "summarise and draw the epochs of several runs"),
    "tables": ("medconstraints.commands:tables", "put a table of results into a Markdown file"),
}
# What an option may be, and how an error calls it.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 2 if it could not be run, and 1 if it says so."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("help", "--help", "-h"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {line}\n" for name, (_, line) in COMMANDS.items()]
        sys.stdout.write(f"{PROGRAM} <command> --help tells the options of each:\n" + "".join(lines))
        return 0
    try:
        call = read_command(given)
        result = None if call is None else call()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"{given[0]}: {error}\n")
        return 2
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{given[0]}: a step failed with exit status {error.returncode}; its messages are above\n")
        return 1
    if isinstance(result, int):
        return result
    if result is not None:
        sys.stdout.write(f"{result}\n")
    return 0


def read_command(arguments: Sequence[str]) -> Callable[[], Any] | None:
    """The call that a command line asks for; None after it has shown a command's help.

    Args:
        arguments: name of the command and its options.

    Raises:
        ValueError: there is no such command, or its options are not as they should be.
    """
    name = arguments[0].replace("-", "_") if arguments else ""
    if name not in COMMANDS:
        raise ValueError(f"no such command{_nearest(name, COMMANDS, '')}")
    function, arguments = pkgutil.resolve_name(COMMANDS[name][0]), list(arguments[1:])
    signature = inspect.signature(function)
    names = [text[2:].split("=")[0].replace("-", "_") for text in arguments if text.startswith("--")]
    wants_help = "help" in names or "-h" in arguments
    for option in names:
        if option not in (*signature.parameters, "help"):
            raise ValueError(f"--{option}: names no option{_nearest(option, signature.parameters, '--')}")
        if names.count(option) > 1:
            raise ValueError(f"--{option}: is given {names.count(option)} times, and only one would count")
    for option, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and option not in names and not wants_help:
            raise ValueError(f"--{option}: is missing")

    return _taken_by_fire(name, function, arguments)


def _taken_by_fire(name: str, function: Callable[..., Any], arguments: list[str]) -> Callable[[], Any] | None:
    signature, taken = inspect.signature(function), dict[str, Any]()

    # Fire calls what it is given before it has looked at all options: this only takes them.
    def take(**options: Any) -> None:
        taken.update(options)

    hints = {option: kind for option, kind in get_type_hints(function).items() if option != "return"}
    functools.update_wrapper(take, function)
    take.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    )
    SetParseFns(**{option: functools.partial(_value, option, kind) for option, kind in hints.items()})(take)
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            fire.Fire(take, command=arguments, name=name)
    except FireExit as stop:
        if stop.code:
            raise ValueError(stop.trace.elements[-1].ErrorAsStr()) from None
        # Without a line that says that help is shown, and without the attribute that holds the parse functions.
        text = shown.getvalue().partition("\n\n")[2].partition("\n\nGROUPS")[0]
        sys.stdout.write(text.replace("GROUP | ", "").rstrip() + "\n")
        return None
    return functools.partial(function, **taken)


def _value(option: str, kind: Any, text: str) -> Any:
    """The value of an option of the annotated kind.

    Raises:
        ValueError: the text is no such value.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if text == "None" and NoneType in kinds:
        return None
    kind = next(choice for choice in kinds if choice is not NoneType)
    inner = get_args(kind)[0] if get_args(kind) else None
    value = text if kind is str or (inner is str and text[:1] not in "[{") else DefaultParseValue(text)
    if get_origin(kind) is Mapping:
        good, expected = isinstance(value, dict), "names and values such as '{\"organ\": [1]}'"
    elif inner is not None:
        allowed, what = KINDS[inner]
        value = list(value) if isinstance(value, list | tuple) else [value]
        good = all(isinstance(item, allowed) and (inner is bool or not isinstance(item, bool)) for item in value)
        expected = f'{what}, or several as in "[..., ...]"'
    else:
        allowed, expected = KINDS[kind if kind in KINDS else str]
        good = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        good = good and not (kind is str and text in ("True", "False"))  # what Fire says for no value at all
    if not good:
        raise ValueError(f"--{option}: expected {expected}, got {text!r}")
    return value


def _nearest(name: str, known: Mapping[str, Any], dashes: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    there_are = ", ".join(dashes + other for other in known)
    return f"; did you mean {dashes}{near[0]}?" if near else f"; there are {there_are}"


if __name__ == "__main__":
    sys.exit(main())
