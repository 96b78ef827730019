"""Templates of the pages."""

from typing import Any


def page_templates() -> Any:
    """The jinja2 environment of all pages; what comes from results or files is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("patcher_pl.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
