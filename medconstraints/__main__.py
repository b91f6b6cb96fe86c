"""Every command of the package: `python -m medconstraints <command> --option value ...`; alone, it lists them.

A command is a function of the package, and its options are the function's arguments. They are read before it is called:
one that it does not have, one given twice, and a value of another kind end with exit status 2 and the reason as the
last line. What it returns is printed; a dictionary is written to the JSON file `--output` and shown in short; a list
names problems, and gives exit status 1 unless it is empty.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import fire
from fire.core import FireExit
from fire.decorators import SetParseFns
from fire.parser import DefaultParseValue

__all__ = ["COMMANDS", "Command", "main", "read_command"]


class Command(NamedTuple):
    """Where a function stands, which is imported when it is asked for, and what the list of commands says of it.

    `shown` is the function that makes a short text of a dictionary, which then is written to a file.
    """

    target: str
    line: str
    shown: str | None = None

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        found: Callable[..., Any] = pkgutil.resolve_name(f"medconstraints.{self.target}")
        return found

    @property
    def signature(self) -> inspect.Signature:
        """Options as keywords, with those of the file that is written."""
        parameters = inspect.signature(self.function).parameters.values()
        options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        return inspect.Signature(options + (_FILE if self.shown else []))


def _to_file(*, output: str, overwrite: bool = False) -> None: ...


_FILE = list(inspect.signature(_to_file).parameters.values())
COMMANDS = {
    "demo": Command("demo:run_demo", "train on synthetic volumes with boxes only, and report"),
    "phantoms": Command("synthetic.phantoms:make_cohort", "write a cohort of synthetic 3D volumes"),
    "discs": Command("synthetic.discs:make_discs", "write a cohort of noisy 2D images of two discs"),
    "check": Command("data.check_datalist:check_datalist", "read every file of a datalist once, and list all faults"),
    "check_dataset": Command("data.manifests:check_dataset", "compare a local copy of a data set with its manifest"),
    "make_datalist": Command(
        "data.manifests:make_datalist", "list the cases of a data set, divided by patient", "data.manifests:numbers_of"
    ),
    "fit_common_bounds": Command("commands:fit_common_bounds", "fit one pair of size bounds for all images"),
    "fit_filling": Command("commands:fit_filling", "fit how much of its boxes an organ fills"),
    "evaluation": Command(
        "reports.evaluation:evaluate_predictions",
        "score saved masks against their references",
        "reports.evaluation:format_summary",
    ),
    "report": Command("reports.report:write_report", "write a page and a picture of scored masks"),
    "curves": Command(
        "reports.curves:read_curves", "summarise and draw the epochs of several runs", "reports.curves:format_curves"
    ),
    "tables": Command("reports.tables:update_table", "put a table of results into a Markdown file"),
}
# What an option may be, and how an error calls it.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    Mapping: ((dict,), "names and values such as '{\"organ\": [1]}'"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 2 if it could not be run, and 1 if it found problems."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("help", "--help", "-h"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {command.line}\n" for name, command in COMMANDS.items()]
        sys.stdout.write("python -m medconstraints <command> --help tells the options of each:\n" + "".join(lines))
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
    problems = result if isinstance(result, list) else []
    shown = "\n".join(problems) if problems else "no problem found" if result == [] else result
    sys.stdout.write("" if shown is None else f"{shown}\n")
    return int(bool(problems))


def read_command(arguments: Sequence[str]) -> Callable[[], Any] | None:
    """The call that a command line asks for; None after it has shown a command's help.

    Args:
        arguments: name of the command and its options.

    Raises:
        ValueError: there is no such command, or its options are not as they should be.
    """
    name = arguments[0].replace("-", "_") if arguments else ""
    if name not in COMMANDS:
        raise ValueError(f"no such command{_nearest(name, COMMANDS)}")
    command, rest = COMMANDS[name], list(arguments[1:])
    parameters = command.signature.parameters
    given = [text[2:].split("=")[0].replace("-", "_") for text in rest if text.startswith("--")]
    for option in given:
        if option not in (*parameters, "help"):
            raise ValueError(f"--{option}: names no option{_nearest(option, parameters)}")
        if given.count(option) > 1:
            raise ValueError(f"--{option}: is given {given.count(option)} times, and only one would count")
    missing = [option for option in parameters if parameters[option].default is inspect.Parameter.empty]
    missing = [option for option in missing if option not in given]
    if missing and "help" not in given and "-h" not in rest:
        raise ValueError(f"--{missing[0]}: is missing")
    options = _taken_by_fire(name, command, rest)
    return None if options is None else functools.partial(_run, command, options)


def _run(command: Command, options: dict[str, Any]) -> Any:
    if command.shown is None:
        return command.function(**options)
    output, overwrite = Path(options.pop("output")), options.pop("overwrite", False)
    if output.exists() and not overwrite:  # before the work, and not after it
        raise FileExistsError(f"--output: {output} exists; choose another name or add --overwrite")
    content = command.function(**options)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return pkgutil.resolve_name(f"medconstraints.{command.shown}")(content)


def _taken_by_fire(name: str, command: Command, arguments: list[str]) -> dict[str, Any] | None:
    taken: dict[str, Any] = {}

    # Fire calls what it is given before it has looked at all options: this only takes them.
    def take(**options: Any) -> None:
        taken.update(options)

    functools.update_wrapper(take, command.function)
    take.__signature__ = command.signature  # type: ignore[attr-defined]
    hints = {**get_type_hints(_to_file), **get_type_hints(command.function)}
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
    return taken


def _value(option: str, kind: Any, text: str) -> Any:
    """The value of an option of the annotated kind, or a ValueError."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if text == "None" and NoneType in kinds:
        return None
    kind = str if str in kinds else next(choice for choice in kinds if choice is not NoneType)
    several = get_origin(kind) is Sequence
    kind = get_args(kind)[0] if several else get_origin(kind) or kind
    value = text if kind is str and not (several and text[:1] == "[") else DefaultParseValue(text)
    items = list(value) if several and isinstance(value, list | tuple) else [value]
    allowed, expected = KINDS[kind]
    good = all(isinstance(item, allowed) and (kind is bool or not isinstance(item, bool)) for item in items)
    if not good or (kind is str and text in ("True", "False")):  # what Fire says for no value at all
        raise ValueError(f"--{option}: expected {expected}{', or several in [...]' * several}, got {text!r}")
    return items if several else value


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


if __name__ == "__main__":
    sys.exit(main())
