"""Pages from the templates beside this file: every value is escaped, a missing one is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """A page of `template`, a file name that extends base.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
