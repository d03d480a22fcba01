"""The look that all report pages share, and how a page becomes one file.

A page is opened from disk, mailed and archived, so it must hold all it needs: style, scripts and numbers are written into it,
and a content security policy forbids it the network. Templates, styles and scripts are named by their path below `mptrain/`;
a template extends `pages/base.html`, which says which blocks there are.
"""

import json
import os
import pathlib
from typing import Any

import jinja2
from markupsafe import Markup

from mptrain.pages import numbers

_HOME = pathlib.Path(__file__).parent.parent


def write(path: pathlib.Path, template: str, **content: Any) -> None:
    """Renders a template and puts the page at `path`, whole or not at all.

    Args:
        path: the file to write; its folder exists.
        template: the template's path below `mptrain/`, such as "numerics/page.html".
        content: what the template names; `data` is handed to the page's scripts as JSON and must hold finite numbers only.

    Raises:
        ValueError: `data` holds a NaN or an infinity, which JSON has no word for.
        jinja2.UndefinedError: the template names what is not in `content`.
    """
    text = _environment().get_template(template).render({"data": None, **content})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HOME),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(inline=_inline, as_json=_as_json)
    environment.filters.update(
        percent=numbers.percent, magnitude=numbers.magnitude, power=numbers.power, power_steps=numbers.power_steps
    )
    return environment


def _inline(name: str) -> Markup:
    return Markup((_HOME / name).read_text(encoding="utf-8"))


def _as_json(data: Any) -> Markup:
    """JSON in which no text can end the script element that holds it: "</script>" and "<!--" both need their "<"."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
