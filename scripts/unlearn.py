"""Unlearn from a fine-tuned classifier.

    accelerate launch scripts/unlearn.py
    accelerate launch scripts/unlearn.py --model_name_or_path ID --dataset_name ID \
        --forget_where source=clinic_a --bias_column source --output_dir out
    accelerate launch scripts/unlearn.py --request request.yaml --output_dir out

Without arguments: the embedded demo. scikit-learn's handwritten digits are coloured so that the hue gives the label away in
the forget set; a small ViT is trained with that bias, unlearns it, and is compared with fine-tuning and retraining.
"""

from dataclasses import dataclass, field

from hf_uib.command_line import parse, run


@dataclass
class ScriptArguments:
    """What to unlearn from, and what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tuned image or text classifier: Hub id or folder. None runs the demo."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder (Parquet, CSV, picture folder, save_to_disk) or file with the training data."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that holds forget and retained rows."})
    test_split: str | None = field(default=None, metadata={"help": "Split to report on; `test` if there is one."})
    calibration_split: str | None = field(
        default=None, metadata={"help": "Split the checkpoint never saw, without the pattern; sets how far to forget."}
    )
    forget_where: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN=VALUE of the rows to forget; all of several must hold. Class names are accepted."},
    )
    bias_column: str | None = field(
        default=None, metadata={"help": "Column with the attribute to report the bias by."}
    )
    retrained_model: str | None = field(
        default=None, metadata={"help": "A model retrained without the forget set, to compare with."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncation length of texts, in tokens."})
    save_merged: bool = field(default=False, metadata={"help": "Also write the merged model to output_dir/merged."})
    request: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with a deletion request: `what`, `why`, `due`, and any of the settings here. It is answered by the "
            "merged model and evidence.html."
        },
    )
    what: str | None = field(
        default=None, metadata={"help": "What is to be forgotten, in words, for card and evidence."}
    )
    why: str | None = field(default=None, metadata={"help": "Why, for the evidence."})
    due: str | None = field(default=None, metadata={"help": "By when a request is due: YYYY-MM-DD."})
    reference: str | None = field(default=None, metadata={"help": "Your file number of a request; never a name."})


def main() -> None:
    """Parse the command line, then run the demo or the user's job."""
    from hf_uib import UIBConfig

    defaults = {"output_dir": "unlearned", "save_strategy": "no", "logging_steps": 50}
    args, script = parse(__doc__, UIBConfig, ScriptArguments, lists={"forget_where": "COLUMN=VALUE"}, **defaults)
    from hf_uib.cli import demo, unlearn

    if script.model_name_or_path is None and script.dataset_name is None and script.request is None:
        demo(args)
    else:
        unlearn(args, script)


if __name__ == "__main__":
    run(main)
