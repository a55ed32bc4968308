"""Pairing, encoding and the checks of the two sets."""

import datasets
import numpy as np
import pytest
import torch
from conftest import make_rows
from PIL import Image
from transformers import BatchFeature, BertTokenizerFast, ViTImageProcessorPil

from hf_uib.data import checks, fingerprints, pairing, reading


def sampler(n_retain, n_forget, ratio=1.0, held_out=frozenset(), on=lambda epoch, position: True, seed=0, epoch=0):
    paired = pairing.PairedDataset(list(range(n_retain)), list(range(n_forget)), max(n_retain, n_forget))
    return pairing.PairingSampler(paired, seed, ratio, set(held_out), on, lambda: epoch)


def test_an_epoch_sees_every_row_and_repeats_the_shorter_set():
    pairs = list(sampler(5, 17))
    assert len(pairs) == 17
    assert sorted(f for _, _, many in pairs for f in many) == list(range(17))
    counts = np.bincount([r for _, r, _ in pairs], minlength=5)
    assert counts.min() >= 3 and counts.max() <= 4


def test_order_is_a_function_of_seed_and_epoch():
    first, second, other = sampler(8, 8), sampler(8, 8), sampler(8, 8, seed=1)
    assert list(first) == list(second) != list(other)
    assert list(first) == list(first) != list(sampler(8, 8, epoch=1))


def test_forget_rows_come_only_while_the_prior_is_on_and_held_out_rows_after():
    order = list(sampler(10, 30, ratio=0.5, held_out={2, 3}, on=lambda epoch, position: position < 12))
    assert sum(len(many) for _, _, many in order[:12]) == 6 and not any(many for _, _, many in order[12:])
    assert not {r for _, r, _ in order[:12]} & {2, 3}
    assert {2, 3} <= {r for _, r, _ in order[12:]}


def test_collator_puts_retained_rows_first_and_drops_what_the_model_does_not_take():
    rows = make_rows(n=6)
    paired = pairing.PairedDataset(rows, make_rows(n=6, seed=1), 6)
    from transformers.data.data_collator import default_data_collator

    collator = pairing.UIBCollator(default_data_collator, {"pixel_values", "labels"})
    batch = collator(paired.__getitems__([(6, 0, (4, 5)), (7, 1, ())]))
    assert batch.retained == 2 and set(batch.features) == {"pixel_values", "labels"}
    assert torch.equal(batch.features["pixel_values"][0], rows[0]["pixel_values"])
    assert len(batch.features["labels"]) == 4 and batch.positions.tolist() == [6, 7, 6, 7]
    assert set(collator([rows[0]])) == {"pixel_values", "labels"}


def test_raw_pictures_and_texts_are_encoded(tmp_path):
    pictures = datasets.Dataset.from_dict(
        {"image": [Image.new(mode, (8, 8)) for mode in ("RGB", "L", "RGBA")], "label": [0, 1, 0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    processor = ViTImageProcessorPil(do_resize=False)
    encoded = reading.encode(pictures.select([0, 2]), processor, "pixel_values")
    assert encoded[0]["pixel_values"].shape == (3, 8, 8) and encoded[1]["label"] == 0
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad")
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    texts = datasets.Dataset.from_dict({"text": ["good", "bad bad"], "label": [0, 1]})
    assert [len(row) for row in reading.encode(texts, tokenizer, "input_ids")[:]["input_ids"]] == [3, 4]
    assert reading.encode(texts, None, "input_ids") is texts


def test_fingerprint_ignores_order_and_sees_content():
    rows = make_rows(n=6)
    assert fingerprints.fingerprint(rows) == fingerprints.fingerprint(rows.select([3, 1, 5, 0, 2, 4]))
    assert fingerprints.fingerprint(rows) != fingerprints.fingerprint(rows.select(range(5)))
    assert fingerprints.fingerprint(rows) != fingerprints.fingerprint(make_rows(n=6, seed=1))


def test_overlap_is_by_content_and_label():
    rows = make_rows(n=6)
    hashes = {"forget_dataset": rows.select([0, 1, 2]), "retain_dataset": rows.select([1, 2, 3])}
    with pytest.raises(ValueError, match="2 rows of forget_dataset are in retain_dataset too"):
        checks.check_overlap({name: fingerprints.row_hashes(part) for name, part in hashes.items()})
    relabelled = rows.with_format(None).map(lambda row: {"labels": (row["labels"] + 1) % 3})
    sets = {
        "forget_dataset": rows.with_format(None),
        "retain_dataset": relabelled,
    }  # outdated labels: same inputs, other labels
    checks.check_overlap({name: fingerprints.row_hashes(part) for name, part in sets.items()})


def test_sample_indices():
    assert pairing.sample_indices(5, 9, 0) == list(range(5))
    drawn = pairing.sample_indices(50, 9, 0)
    assert len(set(drawn)) == 9 and drawn == pairing.sample_indices(50, 9, 0) != pairing.sample_indices(50, 9, 1)


def test_rows_in_common_and_the_fingerprint_against_plain_sets():
    import hashlib

    rows = make_rows(n=40)
    first, second = rows.select(range(25)), rows.select([30, 3, 31, 24, 3])
    hashes = fingerprints.row_hashes(first)
    assert hashes.shape == (25, 2) and fingerprints.rows_in_common(hashes, fingerprints.row_hashes(second)) == 2
    assert fingerprints.rows_in_common(fingerprints.row_hashes(second), hashes) == 3  # a row twice counts twice
    assert fingerprints.rows_in_common(hashes, fingerprints.row_hashes(rows.select(range(25, 40)))) == 0
    expected = hashlib.blake2b(b"".join(sorted(row.tobytes() for row in hashes)), digest_size=8).hexdigest()
    assert fingerprints.fingerprint(first) == fingerprints.fingerprint(first.select(range(24, -1, -1))) == expected


def folder_of_pictures(path, colours):
    path.mkdir()
    for i, colour in enumerate(colours):
        Image.new("L", (8, 8), colour).save(path / f"{path.name}{i}.png")
    files = sorted(str(file) for file in path.iterdir())
    return datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())


def test_pictures_in_files_are_known_by_their_content(tmp_path):
    first, second = (folder_of_pictures(tmp_path / name, (0, 50, 100)) for name in "ab")
    assert fingerprints.fingerprint(first) == fingerprints.fingerprint(second)
    other = folder_of_pictures(tmp_path / "c", (0, 50, 101))
    assert fingerprints.rows_in_common(fingerprints.row_hashes(first), fingerprints.row_hashes(other)) == 2
    (tmp_path / "c" / "c0.png").unlink()  # the reader refuses it in one line
    gone = datasets.Dataset.from_dict(other.with_format("arrow")[:].to_pydict(), features=other.features)
    assert fingerprints.rows_in_common(fingerprints.row_hashes(gone), fingerprints.row_hashes(first)) == 1
    assert len(np.unique(fingerprints.row_hashes(folder_of_pictures(tmp_path / "d", (7, 7))), axis=0)) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [BatchFeature({"pixel_values": np.pad([[[i]]], ((0, 0), (31, 31), (31, 31)))}) for i in range(5)],
        [{"frames": [np.pad([[i]], 40), np.zeros((81, 81))]} for i in range(5)],
        [{"x": torch.full((3,), i, dtype=torch.bfloat16)} for i in range(5)],
        [{"x": ([torch.tensor(i)], "a")} for i in range(5)],
    ],
)
def test_rows_of_arrays_have_hashes_of_their_own(rows):
    assert len(np.unique(fingerprints.row_hashes(rows), axis=0)) == 5
    assert fingerprints.rows_in_common(fingerprints.row_hashes(rows), fingerprints.row_hashes(rows[:2])) == 2
