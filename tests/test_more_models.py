"""Image towers with a head (CLIP, SigLIP, DINOv3), decoders with a `score` head, and videos: the same trainer and promises."""

import datasets
import numpy as np
import pytest
import torch
from conftest import IMAGE, SMALL, TEXT, make_rows
from PIL import Image
from test_trainer import adapter_weights, config, same
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ConvNextPreTrainedModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessorPil,
    SiglipConfig,
    SiglipForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_uib import UIBTrainer
from hf_uib.data.fingerprints import row_hashes
from hf_uib.models import load_classifier

TOWERS = {"text_config": TEXT | SMALL, "vision_config": IMAGE | SMALL, "num_labels": 3, "projection_dim": 8}
DECODER = TEXT | SMALL | {"num_labels": 3, "num_key_value_heads": 1, "head_dim": 8}


def with_head(base, tower):
    """A head of one's own on a tower, of which Transformers has no classifier."""

    class Classifier(base):
        def __init__(self, config):
            super().__init__(config)
            self.tower, width = tower(config), getattr(config, "hidden_sizes", None)
            self.classifier = nn.Linear(width[-1] if width else config.hidden_size, config.num_labels)
            self.post_init()

        def forward(self, pixel_values, **settings):
            return ImageClassifierOutput(logits=self.classifier(self.tower(pixel_values, **settings).pooler_output))

    return Classifier


OwnVit = with_head(DINOv3ViTPreTrainedModel, DINOv3ViTModel)
OwnConvNext = with_head(DINOv3ConvNextPreTrainedModel, DINOv3ConvNextModel)
IMAGES = ("clip", "siglip", "siglip2", "dinov3", "dinov3_convnext")
PROCESSORS = {
    "videomae": lambda: VideoMAEImageProcessorPil(do_resize=False, do_center_crop=False),
    "siglip2": lambda: Siglip2ImageProcessorPil(patch_size=4, max_num_patches=4),  # pixels, mask and shape
}


def model_of(name):
    torch.manual_seed(0)
    return {
        "clip": lambda: CLIPForImageClassification(CLIPConfig(**TOWERS)),
        "siglip": lambda: SiglipForImageClassification(SiglipConfig(**TOWERS)),
        "siglip2": lambda: Siglip2ForImageClassification(
            Siglip2Config(**TOWERS | {"vision_config": SMALL | {"patch_size": 4, "num_patches": 4, "num_channels": 3}})
        ),
        "dinov3": lambda: OwnVit(DINOv3ViTConfig(**IMAGE | SMALL | {"num_register_tokens": 2, "num_labels": 3})),
        "dinov3_convnext": lambda: OwnConvNext(
            DINOv3ConvNextConfig(
                num_channels=1, hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=1.0, num_labels=3
            )
        ),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER)),
        "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**DECODER)),
        "videomae": lambda: VideoMAEForVideoClassification(
            VideoMAEConfig(**IMAGE | SMALL | {"num_channels": 3, "num_frames": 4, "tubelet_size": 2, "num_labels": 3})
        ),
    }[name]()


def videos(n, seed):
    rng = np.random.default_rng(seed)
    frame = lambda: Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    features = {
        "frames": datasets.List(datasets.Image()),
        "label": datasets.Value("int64"),
        "source": datasets.Value("int64"),
    }
    columns = {
        "frames": [[frame() for _ in range(4)] for _ in range(n)],
        "label": rng.integers(0, 3, n).tolist(),
        "source": rng.integers(0, 2, n).tolist(),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def rows_for(name, n, seed):
    if name == "videomae":
        return videos(n, seed)
    if name == "siglip2":
        return videos(n, seed).map(lambda row: {"image": row["frames"][0]}, remove_columns="frames")
    return make_rows("vit" if name in IMAGES else "bert", n, seed=seed)


def trainer_of(path, name, **settings):
    return UIBTrainer(
        model_of(name),
        config(path, **settings),
        rows_for(name, 24, 1),
        rows_for(name, 16, 2),
        calibration_dataset=rows_for(name, 12, 3),
        processing_class=PROCESSORS[name]() if name in PROCESSORS else None,
    )


@pytest.mark.parametrize(
    "name", [*IMAGES[:4], pytest.param(IMAGES[4], marks=pytest.mark.nightly), "llama", "qwen3", "videomae"]
)
def test_it_trains_saves_detaches_merges_resumes_and_audits(tmp_path, name):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6)
    trainer = trainer_of(tmp_path / "a", name, **settings)
    trainer.train()
    after = adapter_weights(trainer)
    base = model_of(name).state_dict()
    detached = trainer.detach().state_dict()
    assert all(torch.equal(detached[key], weight) for key, weight in base.items())
    batch = trainer.data_collator.collate([trainer.retain_dataset[i] for i in range(6)])
    batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
        assert (logits - trainer.detach().eval()(**batch).logits).abs().max() > 1e-4
    report = trainer.audit(rows_for(name, 60, 7), bias_column="source")
    assert np.isfinite(report.metrics["membership"]["model"]["auc"]["value"])
    trainer.create_model_card()
    kind = "image" if name in IMAGES else {"videomae": "video"}.get(name, "text")
    assert f"pipeline_tag: {kind}-classification" in (tmp_path / "a" / "README.md").read_text()
    trainer.save_merged(str(tmp_path / "merged"))
    with torch.no_grad():
        load = trainer.detach().from_pretrained if name.startswith("dinov3") else load_classifier
        again = load(str(tmp_path / "merged")).eval()(**batch).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    resumed = trainer_of(tmp_path / "a", name, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(after, adapter_weights(resumed))


@pytest.mark.parametrize("kind", [DINOv3ViTModel, DINOv3ConvNextModel])
def test_a_tower_without_a_head_gets_one_line(tmp_path, kind):
    tower = kind(kind.config_class(num_channels=1, num_hidden_layers=1))
    with pytest.raises(ValueError, match=f"{kind.__name__} has no head that gives classes"):
        UIBTrainer(tower, config(tmp_path), make_rows(), make_rows(seed=4))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_keys_and_values_of_few_heads_read_what_the_queries_read(tmp_path, name):
    """They have fewer outputs than inputs; read undisturbed, the pattern would go through them."""
    trainer = trainer_of(tmp_path, name)
    trainer.run_statistics_pass()
    noise = trainer.posterior.noise
    queries = [layer for layer in trainer.layers if layer.endswith("q_proj")]
    for query in queries:
        for part in ("k_proj", "v_proj"):
            other = query.replace("q_proj", part)
            assert len(trainer.posterior.factors(other)[1]) < trainer.posterior.subspaces[other].shape[1]
            assert noise.first[other] == noise.first[query] == query
    assert queries and not any(layer.endswith("down_proj") for layer in noise.first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_reads_the_last_token_that_is_no_padding(tmp_path, side):
    trainer = trainer_of(tmp_path, "llama", max_steps=2)
    trainer.train()
    row = trainer.retain_dataset[0]
    short = {key: row[key][None] for key in ("input_ids", "attention_mask")}
    padding = torch.ones(1, 4, dtype=torch.long)  # the padding token's id is 1
    order = slice(None, None, -1 if side == "left" else 1)
    longer = {
        "input_ids": torch.cat([short["input_ids"], padding][order], 1),
        "attention_mask": torch.cat([short["attention_mask"], 0 * padding][order], 1),
    }
    with torch.no_grad():
        one, other = (trainer.model.eval()(**inputs).logits for inputs in (short, longer))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_broken_frame_gets_one_line_and_frames_are_hashed_by_content(tmp_path):
    rows = videos(6, 0)
    assert (row_hashes(rows) == row_hashes(videos(6, 0))).all()
    assert len(np.unique(row_hashes(rows), axis=0)) == 6
    raw = rows.cast_column("frames", datasets.List(datasets.Image(decode=False)))[:]
    raw["frames"][2][1] = {"bytes": b"no picture", "path": None}
    broken = datasets.Dataset.from_dict(raw).cast_column("frames", datasets.List(datasets.Image()))
    processor = VideoMAEImageProcessorPil(do_resize=False, do_center_crop=False)
    with pytest.raises(ValueError, match="Row 2 of forget_dataset has a picture that cannot be read"):
        UIBTrainer(model_of("videomae"), config(tmp_path), broken, videos(8, 1), processing_class=processor)
