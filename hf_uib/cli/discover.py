"""Rank the rows of a training set by how much they teach a shortcut. No attribute has to be labelled.

    hf-uib discover --model_name_or_path ID --dataset_name ID --output_dir found
    hf-uib unlearn --model_name_or_path ID --dataset_name ID --forget_rows found/rows.parquet --output_dir out

Writes rows.parquet (row, score, set), discovery.json and found.png, a contact sheet of both sides. They tell of training rows, and
stay here: no command uploads them.
"""

from dataclasses import dataclass, field
from typing import Any

from ..data.columns import Columns
from ..data.sources import load_splits, split_of
from ..discovery.find import discover
from ..discovery.report import Discovery
from ..inference import reader_of
from ..models import load_classifier
from ..processes import processes
from .outputs import check_writable, quiet
from .parser import parse
from .unlearn import complete_rows, processor_for, remote_code


@dataclass
class DiscoverArguments:
    """Where to look."""

    model_name_or_path: str = field(metadata={"help": "Fine-tuned classifier: Hub id or folder."})
    dataset_name: str = field(metadata={"help": "The data it was trained on: Hub id, folder or file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that it was trained on."})
    text_column: list[str] = field(
        default_factory=list, metadata={"help": "Column of the text, or the two columns of a pair of texts."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the picture."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of the sound."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label."})
    drop_incomplete_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a label or an input that can be read, and count them."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncation length of texts, in tokens."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a checkpoint; only for one whose code you have read."},
    )
    batch_size: int = field(default=256, metadata={"help": "Rows that are passed through the model at once."})
    seed: int = field(default=0, metadata={"help": "Seed of folds and random masks."})
    output_dir: str = field(
        default="found", metadata={"help": "Folder for rows.parquet, discovery.json and found.png."}
    )


def main(arguments: list[str]) -> None:
    """`hf-uib discover ARGUMENTS`."""
    (job,) = parse("discover", __doc__, arguments, DiscoverArguments, lists={"text_column": "COLUMN"}, launched=False)
    find(job)


def find(job: DiscoverArguments) -> Discovery:
    """Look for a shortcut; writes and prints what was found.

    Raises:
        ValueError: in one line, what is wrong with the job.
    """
    quiet()
    check_writable(job.output_dir)
    model: Any = load_classifier(job.model_name_or_path, **remote_code(job)).to(processes().device)
    split = split_of(load_splits(job.dataset_name, job.dataset_config_name), job.train_split)
    processor = processor_for(job, model, job.model_name_or_path)
    columns = Columns(tuple(job.text_column) or None, job.image_column, job.label_column, audio=job.audio_column)
    train, rows = split, None
    if job.drop_incomplete_rows:
        read = reader_of(model, processor, columns)
        rows = complete_rows(split, read, f"split '{job.train_split}'")
        train = split.select(rows)
    found = discover(
        model, train, processing_class=processor, columns=columns, seed=job.seed, batch_size=job.batch_size
    )
    found.save(job.output_dir, split, rows)
    print(f"\n{found}\n\nrows.parquet, discovery.json and found.png: {job.output_dir}")
    return found
