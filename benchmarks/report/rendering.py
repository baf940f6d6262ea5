"""Pages from templates; everything that a page needs is in it, so that it opens offline."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def rendered(template: str, **content: Any) -> str:
    """A page of `templates/`, with the style and the script of all pages."""
    loader = PackageLoader("benchmarks.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def source(*names: str) -> Markup:
        return Markup("\n".join(loader.get_source(environment, name)[0] for name in names))

    return environment.get_template(template).render(**content, css=source("page.css"), js=source("page.js", "map.js"))
