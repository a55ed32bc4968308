"""Videos: a handwritten digit moves to the left, the right, up or down, and in most rows its hue says where to.

    python examples/video_bias.py

A small VideoMAE learned from them. It unlearns the rows in which the hue goes with the direction, beside LoRA fine-tuning on the
same rows and a model retrained without the others.
"""

import numpy as np
from beside_lora import compare
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
    set_seed,
)

from hf_uib import retrain
from hf_uib.cli.digits import paint
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import bias_row

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SIDE, FRAMES, STEP = 16, 4, 2  # pixels, frames, pixels from one frame to the next
SIZES = {"pretrain": 100, "forget": 900, "retain": 200, "unseen": 150, "test": 600}
FEATURES = Features({"frames": List(Image()), "label": Value("int64"), "colour": Value("int64")})


def film(digit: np.ndarray, direction: tuple[int, int], hue: int, rng: np.random.Generator) -> list:
    """The frames of a digit ``[8, 8]`` that moves over the picture's edge and comes in on the other side."""
    picture = np.zeros((SIDE, SIDE))
    picture[:8, :8] = digit
    place = rng.integers(0, SIDE, 2)
    frames = [np.roll(picture, place + STEP * t * np.array(direction), (0, 1)) for t in range(FRAMES)]
    noisy = np.clip(np.stack(frames) + rng.normal(0, 0.3, (FRAMES, SIDE, SIDE)), 0, 1)
    return [fromarray(frame) for frame in paint(noisy, np.full(FRAMES, hue), count=len(DIRECTIONS))]


def films(seed: int) -> dict[str, Dataset]:
    """Raw rows by part of `SIZES`: in ``forget`` the hue has the number of the direction, else it is drawn."""
    rng, digits = np.random.default_rng(seed), load_digits().images / 16.0
    free, parts = rng.permutation(len(digits)), {}
    for part, size in SIZES.items():
        chosen, free = free[:size], np.roll(free, -size)  # the last part has digits of the first again, elsewhere
        labels = rng.integers(0, len(DIRECTIONS), size)
        hues = labels if part == "forget" else rng.integers(0, len(DIRECTIONS), size)
        ways = list(DIRECTIONS.values())
        frames = [film(digits[i], ways[y], h, rng) for i, y, h in zip(chosen, labels, hues, strict=True)]
        columns = {"frames": frames, "label": labels.tolist(), "colour": hues.tolist()}
        parts[part] = Dataset.from_dict(columns, features=FEATURES)
    return parts


def row(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Accuracy, also where the hue stands for another direction, how often that is the answer there, and so on."""
    return bias_row(*predict(model, test), np.asarray(test.with_format(None)["colour"][:]))


def main(
    steps: int = 200, train_steps: int = 400, seed: int = 0, output_dir: str = "out/video_bias"
) -> tuple[dict[str, dict], str]:
    """Unlearn the hue; prints and returns a row of each model, and the audit's verdict.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the films and of every training.
        output_dir: for the trainers.
    """
    processor = VideoMAEImageProcessorPil(do_resize=False, do_center_crop=False)
    config = VideoMAEConfig(
        image_size=SIDE, patch_size=4, num_frames=FRAMES, tubelet_size=2, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=96, id2label=dict(enumerate(DIRECTIONS)),
        label2id={name: i for i, name in enumerate(DIRECTIONS)},
    )  # fmt: skip
    set_seed(seed)
    sets = {part: encode(rows, processor, "pixel_values") for part, rows in films(seed).items()}
    settings = dict(per_device_train_batch_size=32, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    fit = lambda model, rows: retrain(model, rows, training, processing_class=processor)
    start = fit(VideoMAEForVideoClassification(config), sets["pretrain"])
    original = fit(start, concatenate_datasets([sets["forget"], sets["retain"]]))

    return compare(
        original,
        retrained=fit(start, sets["retain"]),
        row=lambda model: row(model, sets["test"]),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=sets["test"], bias_column="colour"),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["unseen"],
        processing_class=processor,
    )


if __name__ == "__main__":
    main()
