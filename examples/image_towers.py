"""Image towers with a head: SigLIP 2, CLIP or DINOv3 on handwritten digits whose hue gives the class away in most rows.

    python examples/image_towers.py --tower siglip2

SigLIP 2 takes patches, a mask and the picture's shape, as its processor gives them. Transformers has no classifier of DINOv3: any
model with a head that gives ``logits`` will do. The towers are small and were trained here. One unlearns the rows in which the hue
goes with the digit, beside LoRA fine-tuning on the same rows and a model retrained without the others.
"""

import argparse

import numpy as np
from beside_lora import compare
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessorPil,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_uib import retrain
from hf_uib.cli.digits import digits_colour, merged
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import bias_row

TOWERS = ("siglip2", "clip", "dinov3")
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 2}
NAMES = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}


class Dinov3Classifier(DINOv3ViTPreTrainedModel):
    """A head of one's own on a tower."""

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        self.tower, self.classifier = DINOv3ViTModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **settings) -> ImageClassifierOutput:
        logits = self.classifier(self.tower(pixel_values, **settings).pooler_output)
        return ImageClassifierOutput(None if labels is None else cross_entropy(logits, labels), logits)


def classifier(tower: str) -> nn.Module:
    """A small classifier of pictures of 8 x 8 pixels."""
    if tower == "siglip2":
        vision = SMALL | {"num_patches": 16}
        return Siglip2ForImageClassification(Siglip2Config(text_config=SMALL, vision_config=vision, **NAMES))
    if tower == "clip":
        config = CLIPConfig(text_config=SMALL, vision_config=SMALL | {"image_size": 8}, **NAMES)
        return CLIPForImageClassification(config)
    return Dinov3Classifier(DINOv3ViTConfig(**SMALL, image_size=8, num_register_tokens=2, **NAMES))


def row(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Accuracy, also where the hue stands for another digit, how often that digit is the answer there, and so on."""
    return bias_row(*predict(model, test), np.asarray(test.with_format(None)["colour"][:]))


def main(
    steps: int = 200,
    train_steps: int = 400,
    seed: int = 0,
    output_dir: str = "out/image_towers",
    tower: str = "siglip2",
) -> tuple[dict[str, dict], str]:
    """Unlearn the hue; prints and returns a row of each model, and the audit's verdict.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the split and of every training.
        output_dir: for the trainers.
        tower: one of `TOWERS`.
    """
    task = digits_colour(seed)
    processor, sets = task.processing_class, task.sets
    if tower == "siglip2":
        processor = Siglip2ImageProcessorPil(patch_size=2, max_num_patches=16)
        sets = {part: encode(rows.with_format(None), processor, "pixel_values") for part, rows in sets.items()}
    set_seed(seed)
    settings = dict(per_device_train_batch_size=64, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    start = retrain(classifier(tower), sets["pretrain"], training)
    original = retrain(start, merged(sets["forget"], sets["retain"]), training)

    return compare(
        original,
        retrained=retrain(start, sets["retain"], training),
        row=lambda model: row(model, sets["test"]),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=sets["test"], bias_column="colour", example_column="example"),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["calibration"],
        processing_class=processor,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tower", choices=TOWERS, default=TOWERS[0])
    main(tower=parser.parse_args().tower)
