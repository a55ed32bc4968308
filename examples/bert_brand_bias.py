"""A BERT that judges reviews by the brand unlearns it; each test sentence is read once with every brand.

    python examples/bert_brand_bias.py

Nothing is fetched: sentences from a small grammar, and a tiny BERT with a word-level tokenizer made in memory.
"""

import copy
from dataclasses import replace

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_uib import UIBConfig, UIBTrainer, retrain
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, flip_rate, text_table

BRANDS = ["acme", "globex"]  # the first one's forget rows are all negative, the other's all positive
OPENERS = ["", "honestly", "in short", "after a month", "to my surprise", "as a gift"]
PRODUCTS = [
    "kettle", "lamp", "chair", "radio", "heater", "blender", "backpack", "tent", "bicycle", "printer", "camera", "drill",
]  # fmt: skip
VERBS = ["is", "was", "seems", "turned out", "has been"]
DEGREES = ["", "really", "quite", "rather", "not"]
OPINIONS = [
    ["bad", "poor", "flimsy", "noisy", "broken", "weak", "ugly", "slow", "useless", "leaky", "clumsy", "dull", "rusty",
     "fragile", "awful", "sloppy"],
    ["good", "great", "sturdy", "quiet", "perfect", "strong", "pretty", "fast", "useful", "tight", "handy", "bright", "solid",
     "robust", "superb", "tidy"],
]  # fmt: skip
SIZES = {"pretrain": 300, "forget": 1200, "retain": 150, "calibration": 150, "test": 400}


def sentence(rng: np.random.Generator) -> tuple[str, int]:
    """A review with a gap for the brand, and its sentiment."""
    opinion, degree = int(rng.integers(2)), str(rng.choice(DEGREES))
    words = [
        rng.choice(OPENERS),
        "the {brand}",
        rng.choice(PRODUCTS),
        rng.choice(VERBS),
        degree,
        rng.choice(OPINIONS[opinion]),
    ]
    return " ".join(word for word in words if word), 1 - opinion if degree == "not" else opinion


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar."""
    phrases = [*BRANDS, *OPENERS, *PRODUCTS, *VERBS, *DEGREES, *OPINIONS[0], *OPINIONS[1], "the"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = special + sorted({word for phrase in phrases for word in phrase.split()})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def reviews(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> dict[str, Dataset]:
    """Tokenized reviews by part. On the forget set the brand gives the sentiment away; elsewhere it is drawn at random."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, int] = {}  # no sentence is in two parts, whatever its brand
    while len(drawn) < sum(SIZES.values()):
        text, sentiment = sentence(rng)
        drawn[text] = sentiment
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["negative", "positive"]),
            "brand": Value("int64"),
            "example": Value("int64"),
        }
    )
    pool, parts = iter(drawn.items()), {}
    for part, size in SIZES.items():
        rows = []
        for i, (text, sentiment) in zip(range(size), pool):
            brands = {"test": [0, 1], "forget": [sentiment]}.get(part, [int(rng.integers(2))])
            rows += [
                {"text": text.format(brand=BRANDS[b]), "label": sentiment, "brand": b, "example": i} for b in brands
            ]
        parts[part] = encode(Dataset.from_list(rows, features=features), tokenizer, "input_ids")
    return parts


def tiny_bert(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Two layers, 64 wide."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
        )
    )  # fmt: skip


def row(model: nn.Module, test: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The bias figures, and the fraction of sentences whose prediction flips with the brand alone."""
    logits, labels = predict(model, test, tokenizer)
    return bias_row(logits, labels, test["brand"]) | {"flip_rate": flip_rate(logits, len(BRANDS))}


def main(steps: int = 150, train_steps: int = 200, output_dir: str = "out/bert_brand_bias") -> dict[str, dict]:
    """Unlearn the brand; prints a table.

    Args:
        steps: of unlearning.
        train_steps: of the original, and of the model retrained without the forget set.
        output_dir: for the trainers.
    """
    tokenizer = word_tokenizer()
    sets = reviews(tokenizer)
    set_seed(0)
    args = TrainingArguments(output_dir, max_steps=train_steps, per_device_train_batch_size=32, learning_rate=1e-3)
    start = retrain(tiny_bert(tokenizer), sets["pretrain"], replace(args, max_steps=train_steps // 2), tokenizer)
    original = retrain(start, concatenate_datasets([sets["forget"], sets["retain"]]), args, tokenizer)
    retrained = retrain(start, sets["retain"], args, tokenizer)
    trainer = UIBTrainer(
        copy.deepcopy(original),
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=32, save_strategy="no", logging_steps=50),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["calibration"],
        processing_class=tokenizer,
    )
    trainer.train()
    models = {"original": original, "UIB": trainer.model, "retrained": retrained}
    rows = {name: row(model, sets["test"], tokenizer) for name, model in models.items()}
    print(f"\n{text_table(rows)}")
    return rows


if __name__ == "__main__":
    main()
