"""ONNX files: the same logits as PyTorch's for any number of rows and any length, refused where not, audited as any model is."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_rows
from test_demo_app import WORDS
from transformers import BertTokenizerFast, ViTImageProcessorPil

from hf_uib import audit_model
from hf_uib.audit.gather import loaded
from hf_uib.cli.audit import AuditArguments, audit
from hf_uib.cli.export import ExportArguments, bias_figures, export, plain_checkpoint
from hf_uib.cli.main import dispatch
from hf_uib.exported import EXPORT, INT8, MODEL, ExportedClassifier, compare, export_onnx, synthetic_inputs
from hf_uib.models import load_classifier

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

pytestmark = pytest.mark.xdist_group("export")  # what is exported once is used by several
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def tokenizer(folder) -> BertTokenizerFast:
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"w{i}" for i in range(60 - len(WORDS)))]))
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=38)


def processor_for(architecture: str, folder):
    return PROCESSOR if "image_size" in ARCHITECTURES[architecture] else tokenizer(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A checkpoint of a ViT, and its export."""
    folder = tmp_path_factory.mktemp("picture")
    model = make_model()
    model.save_pretrained(folder / "run" / "merged")
    PROCESSOR.save_pretrained(folder / "run" / "merged")
    export(ExportArguments(model=str(folder / "run"), onnx=str(folder / "onnx"), int8=True))
    return SimpleNamespace(model=model.eval(), run=folder / "run", onnx=folder / "onnx")


def test_what_is_written(picture):
    assert sorted(os.listdir(picture.onnx)) == sorted(["config.json", EXPORT, MODEL, INT8, "preprocessor_config.json"])
    report = json.loads((picture.onnx / EXPORT).read_text())
    exact, rounded = (report["differences"][name]["synthetic rows"] for name in (MODEL, INT8))
    assert exact["largest_difference"] <= 1e-5 < rounded["largest_difference"] < 0.1 * rounded["largest_logit"]
    assert exact["predictions_that_differ"] == 0 and exact["rows"] == 11
    assert report["bytes"][INT8] < report["bytes"][MODEL]
    for name in os.listdir(picture.onnx):  # no paths of this machine
        content = (picture.onnx / name).read_bytes()
        assert (
            b"site-packages" not in content
            and b"exported.py" not in content
            and str(picture.run).encode() not in content
        )


@pytest.mark.parametrize("rows", [1, 2, 13])
def test_any_number_of_rows(picture, rows):
    exported = ExportedClassifier(picture.onnx / MODEL)
    pixels = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        np.testing.assert_allclose(
            exported(pixel_values=pixels).logits, picture.model(pixel_values=pixels).logits, atol=1e-5
        )


@pytest.mark.slow
def test_any_length(tmp_path):
    model, words = make_model("bert").eval(), tokenizer(tmp_path)
    export_onnx(model, words, tmp_path / "onnx", rows=make_rows("bert"))
    exported = ExportedClassifier(tmp_path / "onnx" / MODEL)
    assert exported.columns == tuple(words.model_input_names)
    for rows, length in ((1, 2), (4, 11), (2, 36)):
        inputs = synthetic_inputs(model, words, rows, length)
        assert inputs["input_ids"].shape == (rows, length)
        with torch.no_grad():
            np.testing.assert_allclose(exported(**inputs).logits, model(**inputs).logits, atol=1e-5)
    with pytest.raises(ValueError, match="input_ids is missing"):
        exported(attention_mask=inputs["attention_mask"])


@pytest.mark.nightly
@pytest.mark.slow
def test_weights_that_are_too_large_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_uib.exported.TOO_LARGE", 0)
    report = export_onnx(make_model(hidden_size=64, intermediate_size=256), PROCESSOR, tmp_path / "onnx", int8=True)
    sizes = {name: (tmp_path / "onnx" / f"{name}.data").stat().st_size for name in (MODEL, INT8)}
    assert sizes[MODEL] > 2 * sizes[INT8] and report["bytes"][MODEL] > sizes[MODEL]
    os.rename(tmp_path / "onnx", tmp_path / "moved")
    assert ExportedClassifier(tmp_path / "moved" / MODEL)(pixel_values=torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["deberta-v2", "convnext"])
def test_every_architecture(architecture, tmp_path):
    model = make_model(architecture)
    report = export_onnx(
        model, processor_for(architecture, tmp_path), tmp_path / "onnx", int8=architecture == "convnext"
    )
    assert report["differences"][MODEL]["synthetic rows"]["predictions_that_differ"] == 0


def test_another_models_logits_are_refused_and_nothing_is_written(picture, tmp_path, monkeypatch):
    other = make_model(seed=1).eval()
    found = compare(other, ExportedClassifier(picture.onnx / MODEL), PROCESSOR, make_rows())
    assert found["synthetic rows"]["largest_difference"] > 0.01 and found["rows"]["largest_difference"] > 0.01
    assert found["rows"]["rows"] == 24 and found["rows"]["predictions_that_differ"] > 0
    monkeypatch.setattr("hf_uib.exported._write_onnx", lambda model, inputs, path: os.link(picture.onnx / MODEL, path))
    with pytest.raises(ValueError, match="more than the tolerance 0.001; nothing was written") as caught:
        export_onnx(other, PROCESSOR, tmp_path / "onnx")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []
    export_onnx(other, PROCESSOR, tmp_path / "onnx", tolerance=100.0)  # the same, where that is allowed
    with pytest.raises(ValueError, match="tolerance"):
        export_onnx(other, PROCESSOR, tmp_path / "onnx")
    assert (tmp_path / "onnx" / EXPORT).is_file()  # the earlier one is whole


def test_nan_is_refused(picture, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_uib.exported._write_onnx", lambda model, inputs, path: os.link(picture.onnx / MODEL, path))
    model = make_model()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="differ by up to nan"):
        export_onnx(model, PROCESSOR, tmp_path / "onnx")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_else_is_refused(picture, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else than an export"):
        export_onnx(picture.model, PROCESSOR, tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_folder_with_a_report_of_that_name_and_something_else_is_kept(picture, tmp_path):
    for name in ("export.json", "thesis.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="something else than an export"):
        export_onnx(picture.model, PROCESSOR, tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_an_adapter_is_merged_in_memory(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = make_model("bert")
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_classifier(tmp_path / "base"), LoraConfig(r=2, target_modules=["query"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    plain, _ = plain_checkpoint(tmp_path / "adapter")
    inputs = synthetic_inputs(base, tokenizer(tmp_path), 3, 9)
    with torch.no_grad():
        merged, wanted, before = (m.eval()(**inputs).logits for m in (plain, adapted, base))
    np.testing.assert_allclose(merged, wanted, atol=1e-6)
    assert not np.allclose(merged, before, atol=1e-3)


def rows_on_disk(folder) -> str:
    import datasets

    splits = {"train": make_rows(n=120, seed=1), "test": make_rows(n=120, seed=2)}
    datasets.DatasetDict({k: v.with_format(None) for k, v in splits.items()}).save_to_disk(str(folder))
    return str(folder)


def test_the_file_is_audited_as_the_model_is(picture, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "before")
    data = rows_on_disk(tmp_path / "data")
    common = dict(
        dataset_name=data, reference=str(tmp_path / "before"), forget_where=["source=1"], bias_column="source"
    )
    PROCESSOR.save_pretrained(tmp_path / "before")
    reports = [
        audit(AuditArguments(model=str(model), output_dir=str(tmp_path / f"audit-{i}"), deep=i == 1, **common))
        for i, model in enumerate((picture.run / "merged", picture.onnx / MODEL))
    ]
    ours, theirs = ({check.name: check for check in report.checks} for report in reports)
    for name in ("over_unlearned", "logits_shifted", "membership_remains", "unchanged"):
        if name in ours:
            assert ours[name].fired == theirs[name].fired
    for part in ("test", "forget", "retain"):
        for figure, cell in reports[0].metrics[part]["model"].items():
            assert reports[1].metrics[part]["model"][figure]["value"] == pytest.approx(
                cell["value"], abs=1e-6, nan_ok=True
            )
    assert theirs["encoder_untouched"].fired is None and theirs["head_refit"].fired is None
    assert reports[1].deep == {} and any("logits alone" in text for text in reports[1].not_measured)
    assert not any("logits alone" in text for text in reports[0].not_measured)


def test_the_folder_of_an_export_is_its_file(picture):
    assert all(isinstance(loaded(str(name)), ExportedClassifier) for name in (picture.onnx, picture.onnx / MODEL))
    assert not isinstance(loaded(str(picture.run / "merged")), ExportedClassifier)


def test_bias_figures_side_by_side(picture):
    sets = {"forget": make_rows(n=60, seed=1), "test": make_rows(n=200, seed=2)}
    table = bias_figures(picture.model, picture.onnx, sets, "source", processing_class=PROCESSOR)
    assert list(table) == ["PyTorch", "ONNX", "int8"] and {"accuracy", "cramers_v", "attack_auc"} <= set(table["ONNX"])
    assert table["ONNX"] == pytest.approx(table["PyTorch"], abs=1e-9)
    assert table["int8"]["attack_auc"] == pytest.approx(table["PyTorch"]["attack_auc"], abs=0.05)


def test_the_command_prints_the_table(picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_uib.exported._write_onnx", lambda model, inputs, path: os.link(picture.onnx / MODEL, path))
    data = rows_on_disk(tmp_path / "data")
    words = ["export", str(picture.run), "--onnx", str(tmp_path / "onnx"), "--int8", "--dataset_name", data]
    (tmp_path / "scores.csv").write_text("score\n" + "\n".join(map(str, range(120))))
    dispatch(
        [*words, "--forget_scores", str(tmp_path / "scores.csv"), "--forget_top", "60", "--bias_column", "source"]
    )
    told = capsys.readouterr().out
    assert "rows of the data: logits differ by up to" in told and "Tolerance of model.onnx: 0.001" in told
    assert all(name in told for name in ("PyTorch", "ONNX", "int8", "Cramér's V"))
    assert set(json.loads((tmp_path / "onnx" / EXPORT).read_text())["bias"]) == {"PyTorch", "ONNX", "int8"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", "--onnx", "OUT"], "No checkpoint nowhere"),
        (["RUN", "--onnx", "OUT", "--bias_column", "source"], "go together"),
        (["RUN", "--onnx", "OUT", "--forget_where", "a=b"], "go together"),
        (["RUN", "--onnx", "OUT", "--forget_rows", "rows.parquet"], "go together"),
    ],
)
def test_a_bad_job_is_one_line(words, message, picture, tmp_path):
    places = {"RUN": str(picture.run), "OUT": str(tmp_path / "onnx")}
    with pytest.raises(ValueError, match=message) as caught:
        dispatch(["export", *(places.get(word, word) for word in words)])
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_a_file_that_is_no_model_is_one_line(picture, tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        ExportedClassifier(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no config.json beside"):
        ExportedClassifier(tmp_path / "bad.onnx")
    picture.model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be read by onnxruntime"):
        ExportedClassifier(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="Give the model before unlearning"):
        audit_model(str(picture.onnx / MODEL), forget_dataset=make_rows(), test_dataset=make_rows())


def test_without_the_extra_it_says_what_to_install(picture, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="onnxruntime is not installed; pip install"):
        export_onnx(picture.model, PROCESSOR, tmp_path / "onnx")
