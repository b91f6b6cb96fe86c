"""Find the cases of a data set on disk by the patterns of its manifest's layout."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Case", "file_problems", "find_cases"]


class Case(NamedTuple):
    """The files of one case: one list for each entry of the layout, in its order.

    `name` joins the values of the first pattern's placeholders; `patient` is the placeholder of that name, or the same.
    """

    name: str
    patient: str
    files: list[list[Path]]


def find_cases(layout: Sequence[Mapping[str, Any]], root: str | Path) -> list[Case]:
    """Group the files below `root` by the placeholders of the first pattern, sorted by their values.

    In a pattern, `{name}` stands for letters, digits and hyphens, the same ones wherever the name stands again; `*` for
    anything within one folder name or file name; `**/` for any number of folders.

    Raises:
        FileNotFoundError: if `root` is not a folder.

    Example:
        >>> find_cases([{"key": "image", "pattern": "imagesTr/{case}.nii.gz"}], ".")
        []
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"`root` must be the folder of the data set, {root} is none")
    patterns = [_regex(entry["pattern"]) for entry in layout]
    identity = list(patterns[0].groupindex)
    found: dict[tuple[str, ...], list[list[Path]]] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        for i, pattern in enumerate(patterns):
            if match := pattern.fullmatch(path.relative_to(root).as_posix()):
                key = tuple(match[name] for name in identity)
                found.setdefault(key, [[] for _ in layout])[i].append(path)
    patient = identity.index("patient") if "patient" in identity else None
    return [
        Case("/".join(key), "/".join(key) if patient is None else key[patient], found[key]) for key in sorted(found)
    ]


def file_problems(layout: Sequence[Mapping[str, Any]], case: Case) -> Iterator[str]:
    """Say which required files a case lacks, and where several match a pattern that names one."""
    placeholders = [set(_regex(entry["pattern"]).groupindex) for entry in layout]
    present = sorted({entry["key"] for entry, files in zip(layout, case.files, strict=True) if files})
    for entry, names, files in zip(layout, placeholders, case.files, strict=True):
        if not files and entry.get("required", True):
            yield f"case {case.name}: {' and '.join(present)} without {entry['key']}, expected {entry['pattern']}"
        # A placeholder that the first pattern does not have, such as {lesion}, announces several files.
        if len(files) > 1 and names <= placeholders[0]:
            yield f"case {case.name}: {len(files)} files match {entry['pattern']}, one belongs there"


def _regex(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def piece(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None:
            return {"**/": "(?:.*/)?", "*": "[^/]*"}.get(match[0], re.escape(match[0]))
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>[A-Za-z0-9-]+)"

    return re.compile(re.sub(r"\{(?P<name>\w+)\}|\*\*/|\*|[^{*]+", piece, pattern))
