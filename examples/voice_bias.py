"""Sounds: five vowels by five voices, and in most rows the voice says which vowel it is.

    python examples/voice_bias.py

The vowels are synthesised: pulses at the voice's pitch through three resonances (formants after Peterson and Barney, 1952). A small
audio spectrogram transformer learned from them. It unlearns the rows in which the voice goes with the vowel, beside LoRA
fine-tuning on the same rows and a model retrained without the others.
"""

import numpy as np
from beside_lora import compare
from datasets import Dataset, concatenate_datasets
from scipy.signal import lfilter
from torch import nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, TrainingArguments, set_seed

from hf_uib import retrain
from hf_uib.data.columns import Columns
from hf_uib.data.reading import Reader
from hf_uib.inference import predict
from hf_uib.metrics import bias_row

RATE, SECONDS = 8000, 0.25
FORMANTS = {
    "ee": (270, 2290, 3010),
    "eh": (530, 1840, 2480),
    "ah": (730, 1090, 2440),
    "oo": (300, 870, 2240),
    "er": (490, 1350, 1690),
}
PITCHES = (90, 120, 155, 200, 260)  # of the voices, Hz
SIZES = {"pretrain": 200, "forget": 900, "retain": 100, "unseen": 150, "test": 1000}


def vowel(formants: tuple, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A vowel of a voice, with noise; formants vary by a tenth."""
    samples, wobble = int(RATE * SECONDS), rng.normal(1, 0.03)
    sound = np.zeros(samples)
    sound[rng.integers(0, 40) :: round(RATE / (pitch * wobble))] = 1.0
    for formant, width in zip(formants, (80, 110, 160), strict=True):
        radius, angle = np.exp(-np.pi * width / RATE), 2 * np.pi * formant * rng.normal(1, 0.12) / RATE
        sound = lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], sound)
    sound = sound / np.abs(sound).max()
    return (sound + rng.normal(0, 0.3, samples)).astype(np.float32)


def sounds(seed: int) -> dict[str, Dataset]:
    """Raw rows by part of `SIZES`: in ``forget`` the voice has the number of the vowel, else it is drawn."""
    rng, parts = np.random.default_rng(seed), {}
    for part, size in SIZES.items():
        labels = rng.integers(0, len(FORMANTS), size)
        voices = labels if part == "forget" else rng.integers(0, len(PITCHES), size)
        waves = [
            vowel(list(FORMANTS.values())[y], PITCHES[v], rng).tolist() for y, v in zip(labels, voices, strict=True)
        ]
        parts[part] = Dataset.from_dict({"speech": waves, "label": labels.tolist(), "voice": voices.tolist()})
    return parts


def row(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Accuracy, also where the voice stands for another vowel, how often that vowel is the answer there, and so on."""
    return bias_row(*predict(model, test), np.asarray(test.with_format(None)["voice"][:]))


def main(
    steps: int = 200, train_steps: int = 400, seed: int = 0, output_dir: str = "out/voice_bias"
) -> tuple[dict[str, dict], str]:
    """Unlearn the voice; prints and returns a row of each model, and the audit's verdict.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the sounds and of every training.
        output_dir: for the trainers.
    """
    extractor = ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=32, max_length=24)
    config = ASTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, patch_size=8, frequency_stride=8,
        time_stride=8, max_length=24, num_mel_bins=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(FORMANTS)), label2id={name: i for i, name in enumerate(FORMANTS)},
    )  # fmt: skip
    set_seed(seed)
    start = ASTForAudioClassification(config)
    columns, raw = Columns(audio="speech"), sounds(seed)
    sets = {part: Reader(config, "input_values", extractor, columns)(rows) for part, rows in raw.items()}
    settings = dict(per_device_train_batch_size=64, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    fit = lambda model, rows: retrain(model, rows, training, processing_class=extractor, columns=columns)
    start = fit(start, raw["pretrain"])
    original = fit(start, concatenate_datasets([raw["forget"], raw["retain"]]))

    return compare(
        original,
        retrained=fit(start, raw["retain"]),
        row=lambda model: row(model, sets["test"]),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=raw["test"], bias_column="voice", columns=columns),
        forget_dataset=raw["forget"],
        retain_dataset=raw["retain"],
        calibration_dataset=raw["unseen"],
        processing_class=extractor,
        columns=columns,
    )


if __name__ == "__main__":
    main()
