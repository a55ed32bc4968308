"""The recipes of the standard sets, on stand-ins of a few dozen rows with the columns of the data on the Hub."""

from itertools import combinations

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

from benchmarks import published, report, results
from benchmarks.__main__ import build_parser
from benchmarks.registry import suite
from benchmarks.suites import runs
from benchmarks.suites.smoke import first_setting
from benchmarks.tasks import TASKS, standard
from hf_uib.data.fingerprints import row_hashes

WORDS = ["bird", "stone", "house", "cloud", "paper", "green", "no", "never", "nothing", "nobody", "."]
NAMES = [name for name, spec in TASKS.items() if spec.recipe]
BIASED = [name for name in NAMES if TASKS[name].kind == "bias"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
# Rows of each cell in training, validation and test split: label and whether the attribute is there
CELLS = {(0, 0): (12, 4, 4), (0, 1): (5, 4, 4), (1, 0): (3, 4, 4), (1, 1): (9, 4, 4)}


def picture(rng) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def sentence(rng, words: list[str]) -> str:
    return " ".join(rng.choice(words, 12)) + " ."


def rows_of(split: int, cells=CELLS) -> list[tuple[int, int]]:
    return [cell for cell, counts in cells.items() for _ in range(counts[split])]


def write(folder, split: str, columns: dict, kinds: dict | None = None) -> None:
    rows = datasets.Dataset.from_dict(columns)
    for name, kind in (kinds or {}).items():
        rows = rows.cast_column(name, kind)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def waterbirds(folder, rng, cells=CELLS) -> None:
    for i, split in enumerate(("train", "validation", "test")):
        pairs = rows_of(i, cells)
        columns = {"image": [picture(rng) for _ in pairs], "label": [y for y, _ in pairs]}
        write(folder, split, columns | {"place": [a for _, a in pairs], "bird": [3] * len(pairs)})


def celeba(folder, rng) -> None:
    for i, split in enumerate(("train", "valid", "test")):
        pairs = rows_of(i)
        columns = {"image": [picture(rng) for _ in pairs], "celeb_id": list(range(len(pairs)))}
        columns["Blond_Hair"] = [bool(y) for y, _ in pairs]
        write(folder, split, columns | {"Male": [not a for _, a in pairs]})


def civil_comments(folder, rng) -> None:
    columns: dict[str, list] = {"comment_text": [], "split": [], "toxicity": []}
    columns |= {name: [] for name in standard.IDENTITIES}
    for i, split in enumerate(("train", "val", "test")):
        for n, (label, value) in enumerate(rows_of(i)):
            shares = [0.2] * 8
            if value:
                shares[n % 8] = shares[(n + 3) % 8] = 0.5
            row = [sentence(rng, WORDS), split, 0.5 + 0.1 * label - 0.1 * (1 - label), *shares]
            for name, entry in zip(columns, row, strict=True):
                columns[name].append(entry)
    write(folder, "train", columns)


def multi_nli(folder, rng) -> None:
    for split, count in (("train", 180), ("validation_matched", 18), ("validation_mismatched", 18)):
        labels, negated = np.arange(count) % 3, np.arange(count) // 3 % 2
        columns = {"premise": [sentence(rng, WORDS) for _ in labels]}
        columns["hypothesis"] = [f"{sentence(rng, WORDS[:6])}{' No!' if n else ' know.'}" for n in negated]
        write(folder, split, columns | {"label": [-1, *labels[1:].tolist()], "genre": ["fiction"] * count})


def cifar(folder, rng, label: str) -> None:
    for split, count in (("train", 100), ("test", 20)):
        columns = {"img": [picture(rng) for _ in range(count)], label: [i % 4 for i in range(count)]}
        write(folder, split, columns, {label: datasets.ClassLabel(names=["a", "b", "c", "d"])})


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Folder by option of the command line."""
    root, rng = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    waterbirds(root / "waterbirds", rng)
    celeba(root / "celeba", rng)
    civil_comments(root / "civil_comments", rng)
    multi_nli(root / "multi_nli", rng)
    cifar(root / "cifar10", rng, "label")
    cifar(root / "cifar100", rng, "fine_label")
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)).save_pretrained(root / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / "vit")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertModel(BertConfig(vocab_size=20, max_position_embeddings=64, **SMALL)).save_pretrained(root / "bert")
    BertTokenizerFast(vocab=vocabulary).save_pretrained(root / "bert")
    return {option: str(root / option) for name in NAMES for option in TASKS[name].data}


def options_of(paths: dict, tmp_path, *words: str):
    flags = [word for option, path in paths.items() for word in (f"--{option}", path)]
    return build_parser().parse_args(["run", *words, *flags, "--seeds", "0", "--cache", str(tmp_path / "cache")])


def cells(rows, attribute: str) -> dict[tuple[int, int], int]:
    pairs = zip(standard.column(rows, "label").tolist(), (standard.column(rows, attribute) != 0).tolist(), strict=True)
    found: dict = {}
    for label, value in pairs:
        found[label, int(value)] = found.get((label, int(value)), 0) + 1
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_in_two_sets_and_a_batch_is_what_the_model_takes(name, paths, tmp_path):
    task = runs.build(name, 0, options_of(paths, tmp_path))
    hashes = {part: set(map(tuple, row_hashes(rows).tolist())) for part, rows in task.sets.items()}
    assert {"forget", "retain", "calibration", "validation", "test"} <= set(hashes)
    assert all(len(hashes[part]) == len(rows) > 0 for part, rows in task.sets.items())
    assert not [pair for pair in combinations(hashes, 2) if hashes[pair[0]] & hashes[pair[1]]]
    logits, labels = runs.predict(task.new_model().eval(), task.sets["test"], task.processing_class, quiet=True)
    assert logits.shape == (len(task.sets["test"]), task.new_model().config.num_labels) and labels.min() >= 0
    assert set(task.train_settings) >= {"steps", "unlearn_steps", "retrain_steps", "batch", "lr", "full_lr"}


@pytest.mark.parametrize("name", ["waterbirds", "celeba", "civil-comments"])
def test_sizes_and_cells_of_the_sets(name, paths, tmp_path):
    task = runs.build(name, 0, options_of(paths, tmp_path))
    of = {part: cells(rows, task.bias_column) for part, rows in task.sets.items()}
    assert of["retain"] == {(0, 0): 3, (0, 1): 3, (1, 0): 3, (1, 1): 3}
    assert of["forget"] == {(0, 0): 9, (1, 1): 6}
    assert of["further"] == {(0, 1): 2}  # with the others, the whole training split
    assert of["calibration"] == of["validation"] == dict.fromkeys(CELLS, 2)
    assert of["test"] == dict.fromkeys(CELLS, 4)


def test_cells_of_multi_nli(paths, tmp_path):
    task = runs.build("multi-nli", 0, options_of(paths, tmp_path))
    of = {part: cells(rows, "negation") for part, rows in task.sets.items()}
    assert len(of["retain"]) == 6 and len(set(of["retain"].values())) == 1
    assert set(of["forget"]) <= {(0, 0), (1, 0), (2, 1)} and set(of["further"]) <= {(0, 1), (1, 1), (2, 0)}
    parts = {part: len(rows) for part, rows in task.sets.items()}
    assert parts["forget"] + parts["retain"] + parts["further"] == round(0.5 * 213)  # three rows have no label
    assert parts["calibration"] + parts["validation"] == round(0.7 * 213) - round(0.5 * 213)
    again = runs.build("multi-nli", 1, options_of(paths, tmp_path)).sets
    assert (row_hashes(again["test"]) == row_hashes(task.sets["test"])).all()  # one split for all seeds


@pytest.mark.parametrize("name", ["cifar10-random", "cifar100-random"])
def test_shares_of_cifar(name, paths, tmp_path):
    for task, gone in ((name, 9), (f"{name}, 50%", 45)):
        sets = runs.build(task, 0, options_of(paths, tmp_path)).sets
        sizes = {part: len(rows) for part, rows in sets.items()}
        assert sizes == {"forget": gone, "retain": 90 - gone, "calibration": 1, "validation": 9, "test": 20}


def test_a_row_that_is_published_twice_is_in_one_set():
    rows = [datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}) for texts in (["a"], ["a", "b"])]
    sets = standard.apart({"retain": rows[0], "forget": rows[1], "calibration": rows[1]})
    assert sets["retain"]["text"][:] == ["a"] and sets["forget"]["text"][:] == ["b"] and not len(sets["calibration"])


def test_negations_are_words_of_the_hypothesis():
    found = [
        standard.negated(s) for s in ("No, it rains.", "He knows nobody!", "I never", "nothing", "no-one", "know")
    ]
    assert found == [True, True, True, True, False, False]


def test_groups_counted_by_hand():
    labels, values = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    right = np.array([1, 1, 1, 0, 0, 0, 1, 1], bool)
    logits = np.eye(2)[np.where(right, labels, 1 - labels)]
    assert standard.group_row(logits, labels, values) == {"accuracy": 5 / 8, "worst_group_accuracy": 0.0}
    mean = (3498 * 1 + 184 * 0.5 + 56 * 0 + 1057 * 1) / 4795
    assert standard.waterbirds_row(logits, labels, values)["accuracy"] == pytest.approx(mean)
    # Fine comments name male (bit 0), one of them female (bit 1) too; toxic ones name female, or nobody
    named = np.array([1, 1, 1, 3, 0, 0, 2, 2])
    row = standard.identities_row(logits, labels, named)
    assert row == {"accuracy": 5 / 8, "worst_group_accuracy": 0.0}  # fine and female: one row, and wrong
    named[3] = 1
    assert standard.identities_row(logits, labels, named)["worst_group_accuracy"] == 3 / 4  # fine and male


@pytest.mark.parametrize("name", ["waterbirds", "multi-nli"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_uib_runs_on_a_recipe(name, paths, tmp_path):
    options = options_of(paths, tmp_path, "--tasks", name, "--methods", "uib")
    path = tmp_path / "results.jsonl"
    runs.run(options, first_setting, path, steps=3)
    (line,) = results.read(path)
    assert line["steps"] == 3 and 0 <= line["worst_group_accuracy"] <= line["accuracy"] <= 1
    made = report.pages([line])
    assert f"{100 * line['worst_group_accuracy']:.1f} ± 0.0" in made["standard_sets.md"]
    assert f"### {name}, measured" in made["standard_sets.md"]
    assert f"| {name}" not in made["index.md"] and f"{name}.md" not in made


@pytest.mark.parametrize("name", [*BIASED, "cifar10-random", "cifar100-random, 50%"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_of_the_page_runs(name, paths, tmp_path):
    methods = published.RUN if name in BIASED else published.RUN_REMOVAL
    options = options_of(paths, tmp_path, "--tasks", name, "--methods", *methods)
    path = tmp_path / "results.jsonl"
    runs.run(options, first_setting, path, steps=3)
    assert {line["method"] for line in results.read(path)} == set(methods)


@pytest.mark.parametrize("name", BIASED)
def test_the_validation_split_s_worst_group_chooses_the_settings(name):
    row = {"accuracy": 0.9, "worst_group_accuracy": 0.7}
    assert runs.score(name, row, None) == 0.7


def test_recipes_run_by_name_alone():
    assert not set(NAMES) & set(suite()) and len(NAMES) == 8
    assert build_parser().parse_args(["run"]).tasks == list(suite())
    assert build_parser().parse_args(["run", "--tasks", "celeba"]).celeba == "flwrlabs/celeba"


def test_what_does_not_fit_is_refused_in_one_line(paths, tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "short", "train", {"image": [picture(rng)], "label": [0]})
    with pytest.raises(ValueError, match="^Split train of .* has no column place; give --waterbirds") as error:
        standard.waterbirds(str(tmp_path / "short"), paths["vit"], 0)
    assert "\n" not in str(error.value)
    waterbirds(tmp_path / "empty", rng, CELLS | {(1, 0): (0, 4, 4)})
    with pytest.raises(ValueError, match="^waterbirds: the training split has 0 rows of waterbird without water"):
        standard.waterbirds(str(tmp_path / "empty"), paths["vit"], 0)
    write(tmp_path / "one", "train", {"image": [picture(rng)], "label": [0], "place": [0]})
    with pytest.raises(ValueError, match="has no split validation; give --waterbirds"):
        standard.waterbirds(str(tmp_path / "one"), paths["vit"], 0)
    waterbirds(tmp_path / "even", rng, dict.fromkeys(CELLS, (3, 4, 4)))
    with pytest.raises(ValueError, match="no row is left to forget"):
        standard.waterbirds(str(tmp_path / "even"), paths["vit"], 0)
