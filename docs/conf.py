"""Sphinx settings of the documentation: ``sphinx-build -W -b html docs docs/_build``."""

import dataclasses
import re

import evaluate
from transformers import TrainingArguments

import hf_uib

project = "hf_uib"
author = "The hf_uib contributors"
version = release = hf_uib.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_fence_as_directive = ["math"]  # the fence in which GitHub, too, renders formulas
myst_heading_anchors = 3  # as GitHub's
suppress_warnings = ["myst.header"]  # generated pages go from their title to the third level

highlight_language = "text"
html_theme = "furo"
html_title = f"hf_uib {release}"
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2166ac", "color-brand-content": "#2166ac"},
    "dark_css_variables": {"color-brand-primary": "#92c5de", "color-brand-content": "#92c5de"},
}

default_role = "py:obj"  # single backticks in docstrings: a link where the name is known, code where it is not
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_param = False  # names that share an entry stay together
napoleon_use_rtype = False
napoleon_custom_sections = [("Result", "params_style"), ("Fields", "params_style")]


COLON = "\ue000"  # stands for a colon that napoleon would take for the end of a type


def before_napoleon(app, what, name, obj, options, lines):
    """Docstrings have Markdown's indented code, [`Name`] as links, and bars for lengths; napoleon reads the rest."""
    text = "\n".join(lines)
    if name.startswith("hf_uib.metrics.") and what == "function":
        text = text.replace("\nReturns:\n", "\nResult:\n")
    elif is_evaluate_module(obj):
        text += f"\n\nName in a combined result: ``{name_of(obj)}``."
    elif name == "hf_uib.UIBConfig":
        text += "\n\nSettings of its own:\n\n" + settings(obj)
    text = text.replace("\nAttributes:\n", "\nFields:\n")
    text = re.sub(r"\[(`[~\w.]+`)\](\(\))?", r"\1", text)
    text = re.sub(r":\n\n(?= {4}\S)", "::\n\n", text)
    text = re.sub(r"^( +[\w, ]+,)\n +(?=\w+: )", r"\1 ", text, flags=re.MULTILINE)  # names of one entry on two lines
    text = "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in re.split(r"(``.+?``)", text))
    without_type = r"(?s).+" if what == "attribute" else r"(?<=\nReturns:\n)(?: +.+\n?)+"
    lines[:] = re.sub(without_type, lambda found: found[0].replace(":", COLON), text).split("\n")


def after_napoleon(app, what, name, obj, options, lines):
    """Gives the colons back."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def is_evaluate_module(obj) -> bool:
    """Whether this is a metric as a class of `evaluate`."""
    return isinstance(obj, type) and issubclass(obj, evaluate.Metric)


def name_of(metric: type) -> str:
    """What `evaluate` calls a metric: its class's name in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", metric.__name__).lower()


def settings(config: type) -> str:
    """The fields that TrainingArguments does not have, with default and help text."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(config) if field.name not in inherited]
    return "\n".join(
        f"- ``{field.name}`` = ``{field.default!r}``: {field.metadata['help'].replace('%%', '%')}" for field in own
    )


def shorten(app, what, name, obj, options, signature, return_annotation):
    """UIBConfig's signature names every field of TrainingArguments, a metric's those of `evaluate`."""
    if name == "hf_uib.UIBConfig":
        return "(output_dir, ...)", None
    return ("", None) if name == "hf_uib.AuditReport" or is_evaluate_module(obj) else None


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("autodoc-process-signature", shorten)
