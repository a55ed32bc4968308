"""Which models on the Hub were made from a model, by their cards, and which of them still hold what it had to forget.

    hf-uib lineage my-org/vit-biased

Asks the Hub for models whose cards name it as their base, and for those made from them. Nothing is downloaded but cards.
"""

from dataclasses import dataclass, field

from ..hub.lineage import lineage, lineage_text
from .parser import parse


@dataclass
class LineageArguments:
    """Which model."""

    repo: str = field(
        metadata={"help": "Hub id of a model, before or after unlearning; may stand first, without the flag."}
    )


def main(arguments: list[str]) -> None:
    """`hf-uib lineage ARGUMENTS`."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--repo", *arguments]
    (job,) = parse("lineage", __doc__, arguments, LineageArguments, lists={}, launched=False)
    print(lineage_text(job.repo, lineage(job.repo)))
