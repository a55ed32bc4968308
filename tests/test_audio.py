"""Classifiers of sounds: files and waveforms through the feature extractor, padding, card, command line."""

import io
import sys

import datasets
import numpy as np
import pytest
import soundfile
import torch
from launching import unlearn_words
from test_trainer import adapter_weights, config, same
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from hf_uib import UIBTrainer
from hf_uib.cli.main import dispatch
from hf_uib.data.columns import Columns
from hf_uib.data.reading import Reader
from hf_uib.models import load_classifier

RATE = 4000
EXTRACTOR = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)


def speech_model(seed=0):
    torch.manual_seed(seed)
    settings = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3),
        conv_stride=(5, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=2,
        classifier_proj_size=8, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(settings)


def wave(pitch, seconds, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def file_of(values, rate=RATE, subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format="WAV", subtype=subtype)
    return {"bytes": buffer.getvalue(), "path": None}


def sounds(n=16, seed=0, rate=RATE, files=True):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    waves = [wave(300 + 300 * y + rng.uniform(0, 50), rng.uniform(0.1, 0.2), rate) for y in labels]
    columns = {"label": labels.tolist(), "speaker": rng.integers(0, 2, n).tolist()}
    if not files:
        return datasets.Dataset.from_dict(columns | {"speech": [w.tolist() for w in waves]})
    rows = datasets.Dataset.from_dict(columns | {"audio": [file_of(w, rate) for w in waves]})
    return rows.cast_column("audio", datasets.Audio(decode=True))


def sound_trainer(path, **settings):
    sets = [sounds(24, 1), sounds(16, 2)]
    return UIBTrainer(
        speech_model(), config(path, **settings), *sets, calibration_dataset=sounds(12, 3), processing_class=EXTRACTOR
    )


def test_files_waveforms_and_other_rates_give_one_input():
    read = Reader(speech_model().config, "input_values", EXTRACTOR)
    from_files = read(sounds(6, 4))
    from_waves = Reader(speech_model().config, "input_values", EXTRACTOR, Columns(audio="speech"))(
        sounds(6, 4, files=False)
    )
    for one, other in zip(from_files, from_waves, strict=True):
        np.testing.assert_allclose(one["input_values"], other["input_values"], atol=1e-3)
        assert one["labels"] == other["labels"] and "audio" not in one
    twice = read(sounds(6, 4, rate=2 * RATE))
    for one, other in zip(from_files, twice, strict=True):
        a, b = (np.asarray(row["input_values"])[100:300] for row in (one, other))
        assert abs(len(one["input_values"]) - len(other["input_values"])) <= 1
        assert np.abs(a - b).max() < 0.1 < np.abs(a).max()


def test_rows_are_padded_to_the_longest_with_a_mask(tmp_path):
    trainer = sound_trainer(tmp_path)
    rows = [trainer.retain_dataset[i] for i in range(4)]
    batch = trainer.data_collator.collate(rows)
    lengths = [len(row["input_values"]) for row in rows]
    assert batch["input_values"].shape == (4, max(lengths)) and len(set(lengths)) > 1
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["labels"].shape == (4,)


def test_it_trains_detaches_merges_resumes_and_audits(tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6)
    trainer = sound_trainer(tmp_path / "a", **settings)
    base = {name: weight.clone() for name, weight in speech_model().state_dict().items()}
    trainer.train()
    after = adapter_weights(trainer)
    detached = trainer.detach().state_dict()
    assert all(torch.equal(detached[name], weight) for name, weight in base.items())
    batch = trainer.data_collator.collate([trainer.retain_dataset[i] for i in range(6)])
    batch = {name: values for name, values in batch.items() if name != "labels"}
    trainer.save_merged(str(tmp_path / "merged"))
    merged = load_classifier(str(tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, trainer.model.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    report = trainer.audit(sounds(120, 7), bias_column="speaker")
    assert 0 <= report.metrics["test"]["model"]["accuracy"]["value"] <= 1
    trainer.save_model()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "pipeline_tag: audio-classification" in card and "AutoModelForAudioClassification" in card
    again = sound_trainer(tmp_path / "a", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(after, adapter_weights(again))


def test_a_spectrogram_model_works(tmp_path):
    settings = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=8, frequency_stride=8,
        time_stride=8, max_length=24, num_mel_bins=16, num_labels=2,
    )  # fmt: skip
    extractor = ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=24)
    trainer = UIBTrainer(
        ASTForAudioClassification(settings),
        config(tmp_path, max_steps=4),
        sounds(24, 1),
        sounds(16, 2),
        processing_class=extractor,
    )
    before = adapter_weights(trainer)
    trainer.train()
    assert not same(before, adapter_weights(trainer))


@pytest.mark.parametrize(
    "sound, message",
    [
        (None, "Row 3 of forget_dataset has no sound"),
        ({"bytes": b"nothing", "path": None}, "Row 3 of forget_dataset has a sound that cannot be read"),
        (file_of(np.zeros(0, np.float32)), "Row 3 of forget_dataset has an empty sound"),
        (
            file_of(np.full(400, np.nan, np.float32), subtype="FLOAT"),
            "Row 3 of forget_dataset has a sound with values that are not finite",
        ),
    ],
)
def test_a_broken_sound_gets_one_line(tmp_path, sound, message):
    rows = sounds(8, 1).cast_column("audio", datasets.Audio(decode=False))[:]
    rows["audio"][3] = sound
    broken = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    with pytest.raises(ValueError, match=message):
        UIBTrainer(speech_model(), config(tmp_path), broken, sounds(16, 2), processing_class=EXTRACTOR)


def test_without_soundfile_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match='pip install "soundfile>=0.12"'):
        UIBTrainer(speech_model(), config(tmp_path), sounds(8, 1), sounds(8, 2), processing_class=EXTRACTOR)


def test_the_command_line(tmp_path):
    speech_model().save_pretrained(tmp_path / "model")
    EXTRACTOR.save_pretrained(tmp_path / "model")
    for split, n in (("train", 60), ("test", 40)):
        sounds(n, n).cast_column("audio", datasets.Audio(decode=False)).to_parquet(
            tmp_path / "data" / f"{split}.parquet"
        )
    dispatch(unlearn_words(tmp_path, "speaker=1"))
    assert "pipeline_tag: audio-classification" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="--text_column is given, but the model takes input_values"):
        dispatch(unlearn_words(tmp_path, "speaker=1", "--text_column", "label"))
