"""Audit a classifier that is said to have unlearned something.

    python scripts/audit.py --model A --reference B --retrained C --dataset_name D --forget_where source=clinic_a \
        --bias_column source --output_dir out

Any two or three checkpoints of one task will do, not only those of hf_uib. Writes report.json and audit.png; the exit status is 0
whether the audit is passed or not (`passed` and `flags` are in the report).
"""

from dataclasses import dataclass, field

from hf_uib.command_line import parse, run


@dataclass
class AuditArguments:
    """What to audit, on what."""

    model: str = field(metadata={"help": "The model that unlearned: Hub id or folder, an adapter's included."})
    dataset_name: str = field(
        metadata={"help": "Hub id, folder or file with the data the reference was trained on, and a test split."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "The model before unlearning. Left out, the base of an adapter is taken."}
    )
    retrained: list[str] = field(
        default_factory=list, metadata={"help": "One or more models trained without the forget set: the oracle."}
    )
    forget_where: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN=VALUE of the rows to forget; all of several must hold. Class names are accepted."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that holds forget and retained rows."})
    test_split: str = field(default="test", metadata={"help": "Split of unbiased rows that no model was trained on."})
    bias_column: str | None = field(default=None, metadata={"help": "Column with the bias attribute."})
    example_column: str | None = field(
        default=None, metadata={"help": "Test rows that share its value differ in the attribute alone."}
    )
    deep: bool = field(
        default=False, metadata={"help": "Also probes, relearning and compression; says first how long it takes."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every sample and resample."})
    output_dir: str = field(default="audit", metadata={"help": "Folder for report.json and the figures."})


def main() -> None:
    """Parse the command line and audit."""
    (script,) = parse(__doc__, AuditArguments, lists={"forget_where": "COLUMN=VALUE", "retrained": None})
    from hf_uib.cli import audit

    audit(script)


if __name__ == "__main__":
    run(main)
