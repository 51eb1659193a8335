"""Prompt templates: plain Python format strings with the class name at "{}" or "{class}"."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from rada.extras import require

# The prompt of the released RAda runs.
DEFAULT_TEMPLATES = ("a photo of a {}.",)

# What CoOp prompts its data sets with, by their names there; all others with the default.
COOP_TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}
# CLIP's lists for ImageNet, as open_clip holds them: all 80, and the 7 that CLIP's authors found to do as well.
IMAGENET_TEMPLATES = {"imagenet-80": "OPENAI_IMAGENET_TEMPLATES", "imagenet-7": "SIMPLE_IMAGENET_TEMPLATES"}


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


def expand_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates, a name in the place of a template being replaced by what it stands for.

    Names: "imagenet-80", "imagenet-7", and CoOp's of a data set ("OxfordPets", see COOP_TEMPLATES). Several templates
    make an ensemble: a class's text feature is the mean of its prompts' unit features. As CoOp does it:
    ["imagenet-7", "OxfordPets"].

    Raises as `check_templates`; ImportError for ImageNet's without open_clip.
    """
    expanded: list[str] = []
    for template in (templates,) if isinstance(templates, str) else templates:
        if template in IMAGENET_TEMPLATES:
            lists = require("open_clip", "clip", f"the templates {template!r}")
            expanded += [fill_in("{}") for fill_in in getattr(lists, IMAGENET_TEMPLATES[template])]
        else:
            expanded.append(COOP_TEMPLATES.get(template, template))
    return check_templates(expanded)
