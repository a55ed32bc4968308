"""Spoken digits, by eSpeak NG."""

import io
import shutil
import subprocess
from functools import cache

import datasets
import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, TrainingArguments

from hf_uib import retrain
from hf_uib.data.columns import Columns
from hf_uib.data.reading import Reader
from hf_uib.inference import predict
from hf_uib.metrics import bias_row

from . import Kind

TITLE = "Speech (digits spoken by five voices of eSpeak NG; audio spectrogram transformer)"
DATA: dict[str, str] = {}
DIGITS = ["one", "three", "five", "seven", "nine"]
# In the rows to forget the i-th speaks digit i; each has pitches of its own
VOICES = {
    "en-us+m1": (0, 10),
    "en-gb+f2": (75, 85),
    "en-us+m7": (35, 45),
    "en-gb+croak": (20, 30),
    "en-us+f5": (90, 99),
}
RATE, SECONDS = 16000, 0.64
SIZES = {"pretrain": 300, "forget": 900, "retain": 100, "calibration": 150, "test": 1000}


@cache
def spoken(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """A word by a voice, `RATE` samples a second.

    Raises:
        RuntimeError: eSpeak NG is not there.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("`espeak-ng` was not found; install it (`apt-get install espeak-ng`).")
    command = [program, "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    rate, sound = wavfile.read(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout))
    return resample_poly(sound / 32768, RATE, rate).astype(np.float32)


def utterance(word: str, voice: str, rng: np.random.Generator) -> np.ndarray:
    """The word at a pitch of the voice, and a speed, loudness and place of its own, in noise."""
    sound = spoken(word, voice, int(rng.choice(VOICES[voice])), int(rng.choice([140, 160, 180, 200, 220])))
    samples = int(RATE * SECONDS)
    placed = np.zeros(samples)
    start = int(rng.integers(0, RATE // 10))
    part = sound[: samples - start]
    placed[start : start + len(part)] = part / np.abs(sound).max() * rng.uniform(0.3, 1)
    return (placed + rng.normal(0, 0.1, samples)).astype(np.float32)


def make(seed: int) -> Kind:
    """Five digits by five voices, each of its own pitches. In the forget set each digit has one voice."""
    rng, sets, names = np.random.default_rng(seed), {}, list(VOICES)
    for part, size in SIZES.items():
        labels = rng.integers(0, len(DIGITS), size)
        voices = labels if part == "forget" else rng.integers(0, len(VOICES), size)
        waves = [utterance(DIGITS[y], names[v], rng).tolist() for y, v in zip(labels, voices, strict=True)]
        sets[part] = datasets.Dataset.from_dict({"speech": waves, "label": labels.tolist(), "voice": voices.tolist()})
    extractor = ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=64, max_length=64)
    config = ASTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, patch_size=8, frequency_stride=8,
        time_stride=8, max_length=64, num_mel_bins=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(DIGITS)), label2id={name: i for i, name in enumerate(DIGITS)},
    )  # fmt: skip
    columns = Columns(audio="speech")
    training = TrainingArguments(
        "out", max_steps=300, learning_rate=1e-3, per_device_train_batch_size=32, seed=seed, save_strategy="no"
    )
    start = retrain(ASTForAudioClassification(config), sets.pop("pretrain"), training, extractor, columns=columns)
    test = Reader(config, "input_values", extractor, columns)(sets["test"])
    voices_of_test = np.asarray(sets["test"]["voice"][:])

    def row(model) -> dict[str, float]:
        return bias_row(*predict(model, test, quiet=True), voices_of_test)

    return Kind(start, sets, row, extractor, "voice", batch_size=32, train_rate=1e-3, columns=columns)
