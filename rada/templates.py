"""Prompt templates: plain Python format strings with the class name at "{}" or "{class}"."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

# The prompt of the released RAda runs.
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; one string is one template.

    Raises TypeError for what is not a string, ValueError for no template at all or one without a place for
    the class name or with another field; both name the template.
    """
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("templates: got none; it takes at least one format string")
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f"templates: got {template!r}; it takes format strings such as {DEFAULT_TEMPLATES[0]!r}")
        try:
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise ValueError(f"templates: got {template!r}, which is no format string: {error}") from error
        if not fields or not set(fields) <= {"", "class"} or fields.count("") > 1:
            raise ValueError(
                f"templates: got {template!r}; it takes a format string with one {{}}, or with {{class}}, "
                "for the class name, and no other field"
            )
    return templates


def fill(template: str, class_name: str) -> str:
    """The prompt of one class."""
    return template.format(class_name, **{"class": class_name})
