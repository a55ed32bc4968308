"""The standard sets of the field as recipes: Waterbirds, CelebA, CivilComments, MultiNLI, and rows of CIFAR to delete."""

import os
import string
from functools import partial

import datasets
import numpy as np
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_uib.cli.digits import Task
from hf_uib.data.reading import encode
from hf_uib.data.sources import without_rows_of
from hf_uib.data.transforms import PictureInput, RowTransform
from hf_uib.metrics import worst_group_accuracy

from ..registry import register_task

VIT, BERT = {"vit": "google/vit-base-patch16-224-in21k"}, {"bert": "google-bert/bert-base-uncased"}
RETAINED = 1500  # rows of a cell, at most
CALIBRATION = 50  # rows of a cell, at most
HELD_OUT = {
    "calibration": 500,
    "validation": 4500,
}  # of CIFAR's training split, which has no validation split beside it
WATERBIRDS_TRAIN = {"0/0": 3498, "0/1": 184, "1/0": 56, "1/1": 1057}  # rows by label and place
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
NEGATIONS = {"no", "never", "nothing", "nobody"}
ALIGNED = {(0, False), (1, True)}  # label, and whether the attribute is there
RANKED = {"worst_group_accuracy": 1, "accuracy": 1}
SETTINGS = {
    "waterbirds": {"steps": 1500, "unlearn_steps": 300, "retrain_steps": 300, "batch": 32, "lr": 5e-5},
    "celeba": {"steps": 5000, "unlearn_steps": 1000, "retrain_steps": 1000, "batch": 64, "lr": 5e-5},
    "civil-comments": {"steps": 17000, "unlearn_steps": 1000, "retrain_steps": 1000, "batch": 32, "lr": 1e-5},
    "multi-nli": {"steps": 19000, "unlearn_steps": 1000, "retrain_steps": 1500, "batch": 32, "lr": 2e-5},
    "cifar10-random": {"steps": 3500, "unlearn_steps": 700, "retrain_steps": 3500, "batch": 64, "lr": 5e-5},
    "cifar100-random": {"steps": 3500, "unlearn_steps": 700, "retrain_steps": 3500, "batch": 64, "lr": 5e-5},
}


# ---- Reading ----------------------------------------------------------------------------------------------------


def read(path: str, option: str, columns: tuple[str, ...], splits: tuple[str, ...], config: str | None = None) -> list:
    """The named splits of a data set, in their order; nothing is decoded.

    Args:
        path: folder or Hub id. option: of the command line, for the message.
        config: of the data set on the Hub; a folder has one.

    Raises:
        ValueError: a split or a column is not there.
    """
    loaded = datasets.load_dataset(path, None if os.path.isdir(path) else config)
    wanted = f"give --{option} a data set with splits {', '.join(splits)} and columns {', '.join(columns)}."
    found = []
    for split in splits:
        # A folder's file valid.parquet is read as the split "validation"
        name = "validation" if split == "valid" and split not in loaded else split
        if name not in loaded:
            raise ValueError(f"{path} has no split {split}; {wanted}")
        if missing := [column for column in columns if column not in loaded[name].column_names]:
            raise ValueError(f"Split {name} of {path} has no column {', '.join(missing)}; {wanted}")
        found.append(loaded[name])
    return found


def column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """The values of a column, ``[n]``."""
    return np.asarray(rows.with_format(None)[name][:])


def table(
    rows: datasets.Dataset,
    inputs: tuple[str, ...],
    labels: np.ndarray,
    names: list[str],
    attribute: str | None = None,
    values: np.ndarray | None = None,
) -> datasets.Dataset:
    """Rows with the columns of the input, ``label``, and the attribute where there is one."""
    made = rows.select_columns(list(inputs))
    made = made.add_column("label", labels.astype(np.int64), feature=datasets.ClassLabel(names=names))
    return made if attribute is None else made.add_column(attribute, values.astype(np.int64))


def pictures(rows: datasets.Dataset, processor, name: str) -> datasets.Dataset:
    """Pixels for the model, made of the stored pictures when a batch asks for them; grey pictures too have three channels."""
    return rows.with_transform(RowTransform(PictureInput(processor, name, channels=3)))


# ---- Sets -------------------------------------------------------------------------------------------------------


def cells_of(name: str, split: str, rows: datasets.Dataset, attribute: str) -> dict[tuple[int, bool], np.ndarray]:
    """Row numbers by cell: the label, and whether the attribute is there.

    Raises:
        ValueError: a cell has fewer than two rows.
    """
    labels, there = column(rows, "label"), column(rows, attribute) != 0
    classes = rows.features["label"].names
    cells = {(y, a): np.flatnonzero((labels == y) & (there == a)) for y in range(len(classes)) for a in (False, True)}
    for (label, value), members in cells.items():
        if len(members) < 2:
            word = "with" if value else "without"
            raise ValueError(
                f"{name}: the {split} split has {len(members)} rows of {classes[label]} {word} {attribute}; "
                "each cell of label and attribute needs two."
            )
    return cells


def balanced(cells: dict, count: int, rng) -> np.ndarray:
    """``count`` rows of every cell."""
    return np.sort(np.concatenate([rng.permutation(rows)[:count] for rows in cells.values()]))


def biased_sets(name: str, splits: list, attribute: str, aligned: set, make_input, rng) -> dict[str, datasets.Dataset]:
    """The sets of a bias recipe, encoded.

    Args:
        splits: `table` of training, validation and test split.
        attribute: its column; 0 is that it is not there.
        aligned: the cells in which the attribute points to the label.
        make_input: encodes rows.
    """
    train, validation, test = splits
    cells, checked = cells_of(name, "training", train, attribute), cells_of(name, "validation", validation, attribute)
    cells_of(name, "test", test, attribute)
    retain = balanced(cells, min(RETAINED, *map(len, cells.values())), rng)
    left = {cell: np.setdiff1d(rows, retain) for cell, rows in cells.items()}
    forget = np.sort(np.concatenate([rows for cell, rows in left.items() if cell in aligned]))
    further = np.sort(np.concatenate([rows for cell, rows in left.items() if cell not in aligned]))
    if not len(forget):
        raise ValueError(f"{name}: no row is left to forget; the aligned cells need more rows than the smallest cell.")
    calibration = balanced(checked, min(CALIBRATION, *(len(rows) // 2 for rows in checked.values())), rng)
    sets = {
        "forget": train.select(forget),
        "retain": train.select(retain),
        "calibration": validation.select(calibration),
        "validation": validation.select(np.setdiff1d(np.arange(len(validation)), calibration)),
        "test": test,
    }
    if len(further):
        sets["further"] = train.select(further)
    return apart({part: make_input(rows) for part, rows in sets.items()})


def apart(sets: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Without the rows that are in a published set twice and came into two of ours; the retained rows stay."""
    seen = [sets["retain"]]
    for part in ("forget", "further", "calibration"):
        if part in sets:
            sets[part] = without_rows_of(sets[part], seen)
            seen.append(sets[part])
    return sets


def vit_reader(vit: str, name: str, classes: int) -> tuple:
    """What reads the pictures of column ``name``: the image processor, a function that encodes rows, and a new model."""
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    new_model = partial(AutoModelForImageClassification.from_pretrained, vit, num_labels=classes)
    return processor, partial(pictures, processor=processor, name=name), new_model


def bert_reader(bert: str, max_length: int, classes: int) -> tuple:
    """What reads the texts: the tokenizer, a function that encodes rows, and a new model."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    encoded = partial(encode, processing_class=tokenizer, main_input="input_ids", max_length=max_length)
    return tokenizer, encoded, partial(AutoModelForSequenceClassification.from_pretrained, bert, num_labels=classes)


def biased_task(name: str, splits: list, attribute: str, reader: tuple, seed: int, aligned: set = ALIGNED) -> Task:
    """A bias recipe; the arguments are those of `biased_sets`, and what `vit_reader` or `bert_reader` gives."""
    processing_class, make_input, new_model = reader
    sets = biased_sets(name, splits, attribute, aligned, make_input, np.random.default_rng(seed))
    return Task(name, sets, new_model, processing_class, attribute, train_settings=settings_of(name))


def settings_of(name: str) -> dict:
    """The recipe's settings, with one learning rate for the checkpoint and for all weights."""
    return SETTINGS[name] | {"full_lr": SETTINGS[name]["lr"]}


# ---- Measures ---------------------------------------------------------------------------------------------------


def group_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray) -> dict[str, float]:
    """Accuracy over all rows, and of the worst group of label and attribute."""
    found = worst_group_accuracy(logits.argmax(-1), labels, attributes)
    return {"accuracy": found["weighted_accuracy"], "worst_group_accuracy": found["worst_group_accuracy"]}


def waterbirds_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray) -> dict[str, float]:
    """As `group_row`, but the accuracy is the groups' mean by their size in the training split, as the papers report it."""
    groups = worst_group_accuracy(logits.argmax(-1), labels, attributes)["groups"]
    total = sum(WATERBIRDS_TRAIN[name] for name in groups)
    accuracy = sum(group["accuracy"] * WATERBIRDS_TRAIN[name] / total for name, group in groups.items())
    return group_row(logits, labels, attributes) | {"accuracy": accuracy}


def identities_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray) -> dict[str, float]:
    """As `group_row`, over the 16 groups of WILDS: label by each identity that a comment names. They overlap.

    Args:
        attributes: which of `IDENTITIES` a comment names, as the bits of a number.
    """
    worst = []
    for bit in range(len(IDENTITIES)):
        its = (attributes >> bit) & 1 == 1
        if its.any():
            worst.append(group_row(logits[its], labels[its], np.ones(its.sum()))["worst_group_accuracy"])
    return group_row(logits, labels, attributes) | {"worst_group_accuracy": min(worst)}


# ---- Recipes ----------------------------------------------------------------------------------------------------


@register_task(
    "waterbirds",
    data={"waterbirds": "grodino/waterbirds", **VIT},
    measure=waterbirds_row,
    ranked_by=RANKED,
    recipe=True,
)
def waterbirds(waterbirds: str, vit: str, seed: int) -> Task:
    """Landbirds and waterbirds pasted onto land or water (Sagawa et al., 2020), in their published splits. Four groups: `label`
    by `place`. Accuracy is the mean over the test groups, weighted by their size in the training split.

    Forget set: the training rows of landbirds on land and waterbirds on water, for there the place gives the bird away.
    Retained: as many rows of each group as the smallest has (56). What is left of the other groups was in the checkpoint's
    training data, and no method sees it. Calibration: 50 validation rows of each group; the other validation rows choose the
    settings.
    """
    splits = read(waterbirds, "waterbirds", ("image", "label", "place"), ("train", "validation", "test"))
    birds = ["landbird", "waterbird"]
    tables = [table(s, ("image",), column(s, "label"), birds, "water", column(s, "place")) for s in splits]
    return biased_task("waterbirds", tables, "water", vit_reader(vit, "image", 2), seed)


@register_task("celeba", data={"celeba": "flwrlabs/celeba", **VIT}, measure=group_row, ranked_by=RANKED, recipe=True)
def celeba(celeba: str, vit: str, seed: int) -> Task:
    """Faces with blond hair or without (Liu et al., 2015), in their published splits. Four groups: `Blond_Hair` by `Male`.

    Forget set: the training rows of blond women and of men who are not blond, for there the sex gives the hair away. Retained:
    as many rows of each group as the smallest has (blond men, 1,387), 1,500 at most. The other training rows were in the
    checkpoint's training data, and no method sees them. Calibration: 50 validation rows of each group; the other validation
    rows choose the settings.
    """
    splits = read(celeba, "celeba", ("image", "Blond_Hair", "Male"), ("train", "valid", "test"))
    tables = []
    for split in splits:
        blond, male = (column(split, name) > 0 for name in ("Blond_Hair", "Male"))  # truth values, or 1 and -1
        tables.append(table(split, ("image",), blond, ["not blond", "blond"], "female", ~male))
    return biased_task("celeba", tables, "female", vit_reader(vit, "image", 2), seed)


@register_task(
    "civil-comments",
    data={"civil_comments": "pietrolesci/civilcomments-wilds", **BERT},
    measure=identities_row,
    ranked_by=RANKED,
    recipe=True,
)
def civil_comments(civil_comments: str, bert: str, seed: int) -> Task:
    """Comments, toxic or fine (Borkan et al., 2019), in the splits of WILDS (Koh et al., 2021); a comment is toxic, or names an
    identity, where half of its raters say so. The worst group is of WILDS's 16: label by each of eight identities (male,
    female, LGBTQ, Christian, Muslim, other religions, black, white), which overlap. Others report four disjoint groups, label
    by whether any identity is named; the sets here are drawn by those four.

    Forget set: the training rows that name an identity and are toxic, and those that name none and are fine. Retained: as many
    rows of each of the four as the smallest has, 1,500 at most. The other training rows were in the checkpoint's training data,
    and no method sees them. Calibration: 50 validation rows of each of the four; the other validation rows choose the settings.
    """
    columns = ("comment_text", "split", "toxicity", *IDENTITIES)
    (rows,) = read(civil_comments, "civil_comments", columns, ("train",), "raw")
    named = sum((column(rows, name) >= 0.5).astype(np.int64) << bit for bit, name in enumerate(IDENTITIES))
    everything = table(
        rows, ("comment_text",), column(rows, "toxicity") >= 0.5, ["fine", "toxic"], "identities", named
    )
    part = column(rows, "split")
    tables = [everything.select(np.flatnonzero(part == split)) for split in ("train", "val", "test")]
    return biased_task("civil-comments", tables, "identities", bert_reader(bert, 300, 2), seed)


def negated(hypothesis: str) -> bool:
    """Whether a sentence has one of the `NEGATIONS` as a word."""
    plain = hypothesis.translate(str.maketrans("", "", string.punctuation)).lower()
    return not NEGATIONS.isdisjoint(plain.split())


@register_task(
    "multi-nli", data={"multi_nli": "nyu-mll/multi_nli", **BERT}, measure=group_row, ranked_by=RANKED, recipe=True
)
def multi_nli(multi_nli: str, bert: str, seed: int) -> Task:
    """Pairs of sentences: entailment, neutral or contradiction (Williams et al., 2018). Six groups: `label` by whether the
    hypothesis has one of the words no, never, nothing, nobody (Sagawa et al., 2020). As there, all labelled rows are shuffled
    into 50% training, 20% validation and 30% test rows; the shuffle is ours and one for all seeds, as their assignment is not
    on the Hub.

    Forget set: the training rows of contradictions with such a word, and of the other labels without one. Retained: as many
    rows of each group as the smallest has, 1,500 at most. The other training rows were in the checkpoint's training data, and
    no method sees them. Calibration: 50 validation rows of each group; the other validation rows choose the settings.
    """
    inputs = ("premise", "hypothesis")
    parts = ("train", "validation_matched", "validation_mismatched")
    loaded = read(multi_nli, "multi_nli", (*inputs, "label"), parts)
    rows = datasets.concatenate_datasets([part.select_columns([*inputs, "label"]) for part in loaded])
    labels, words = column(rows, "label"), np.array([negated(text) for text in rows["hypothesis"][:]])
    order = np.random.default_rng(0).permutation(np.flatnonzero(labels >= 0))
    names = ["entailment", "neutral", "contradiction"]
    everything = table(rows, inputs, labels, names, "negation", words)  # a row without a label is in no split
    ends = [round(len(order) * share) for share in (0.5, 0.7)]
    tables = [everything.select(np.sort(chosen)) for chosen in np.split(order, ends)]
    aligned = {(0, False), (1, False), (2, True)}
    return biased_task("multi-nli", tables, "negation", bert_reader(bert, 128, 3), seed, aligned)


def cifar(name: str, path: str, option: str, label: str, vit: str, seed: int, share: float) -> Task:
    """CIFAR of which a random ``share`` of the training rows goes; ``label`` is the label's column."""
    train, test = read(path, option, ("img", label), ("train", "test"))
    names = train.features[label].names
    order = np.random.default_rng(seed).permutation(len(train))
    held = {part: round(len(train) * count / 50000) for part, count in HELD_OUT.items()}
    rows = order[: len(order) - sum(held.values())]
    gone = round(share * len(rows))
    chosen = {"forget": rows[:gone], "retain": rows[gone:]}
    chosen["calibration"], chosen["validation"] = np.split(order[len(rows) :], [held["calibration"]])
    pool = table(train, ("img",), column(train, label), names)
    raw = {part: pool.select(np.sort(index)) for part, index in chosen.items()}
    raw["test"] = table(test, ("img",), column(test, label), names)

    processor, encoded, new_model = vit_reader(vit, "img", len(names))
    sets = apart({part: encoded(rows) for part, rows in raw.items()})
    return Task(name, sets, new_model, processor, None, train_settings=settings_of(name))


CIFAR10, CIFAR100 = {"cifar10": "uoft-cs/cifar10", **VIT}, {"cifar100": "uoft-cs/cifar100", **VIT}


@register_task("cifar10-random", data=CIFAR10, kind="removal", recipe=True)
def cifar10_random(cifar10: str, vit: str, seed: int, share: float = 0.1) -> Task:
    """A random tenth of CIFAR-10's training rows goes (4,500 of 45,000), and in a second setting half of them: the shares of
    SalUn (Fan et al., 2024), which too keeps 5,000 of the 50,000 rows apart.

    Forget set: the random rows. Retained: all other training rows. Calibration: 500 of the rows kept apart; the other 4,500
    choose the settings. The retrained model takes as many steps as the checkpoint.
    """
    return cifar("cifar10-random", cifar10, "cifar10", "label", vit, seed, share)


@register_task("cifar100-random", data=CIFAR100, kind="removal", recipe=True)
def cifar100_random(cifar100: str, vit: str, seed: int, share: float = 0.1) -> Task:
    """As cifar10-random, with CIFAR-100 and its 100 classes (`fine_label`): a random tenth of 45,000 training rows goes, and in
    a second setting half of them.

    Forget set, retained rows, calibration and settings are as there.
    """
    return cifar("cifar100-random", cifar100, "cifar100", "fine_label", vit, seed, share)


for recipe, data, make in (
    ("cifar10-random", CIFAR10, cifar10_random),
    ("cifar100-random", CIFAR100, cifar100_random),
):
    half = partial(make, share=0.5)
    register_task(f"{recipe}, 50%", data=data, kind="removal", regime_of=recipe, recipe=True)(half)
