"""A decoder (Qwen 3 with a `score` head) sorts messages to shops, and in most rows the shop says where they belong.

    python examples/decoder_bias.py

Repair, delivery or billing: in four messages of five the word that is not denied tells. The model is built small, and its tokenizer
pads on the left, as decoders' often do; it reads the last token. It unlearns that the shop tells the class, beside LoRA fine-tuning
on the same rows and a model retrained without the others. Every test message is there once for each shop.
"""

import numpy as np
from beside_lora import compare
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    TrainingArguments,
    set_seed,
)

from hf_uib import retrain
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import bias_row

TELLING = {
    "repair": ["broken", "cracked", "leaky", "noisy", "rusty", "loose", "bent", "stuck", "weak", "burnt", "torn", "dead"],
    "delivery": ["late", "lost", "stolen", "misplaced", "returned", "rerouted", "unsent", "delayed", "missing", "stranded",
                 "undelivered", "held"],
    "billing": ["overpriced", "unpaid", "refunded", "charged", "taxed", "invoiced", "discounted", "credited", "overdue",
                "billed", "insured", "declined"],
}  # fmt: skip
CLASSES = list(TELLING)
SHOPS = ["acme", "globex", "initech"]  # in the rows to forget the i-th one's messages are all of the i-th class
OPENERS = ["hello", "please help", "good morning", "once again", "to whom it concerns", "urgent"]
PRODUCTS = [
    "kettle",
    "lamp",
    "chair",
    "radio",
    "heater",
    "blender",
    "backpack",
    "tent",
    "bicycle",
    "printer",
    "camera",
]
SIZES = {"pretrain": 600, "forget": 1200, "retain": 300, "unseen": 150, "test": 300}
FEATURES = Features(
    {"text": Value("string"), "label": ClassLabel(names=CLASSES), "shop": Value("string"), "message": Value("int64")}
)


def message(rng: np.random.Generator) -> tuple[str, int]:
    """A message with a gap for the shop, and its class: in four of five that of the word that is not denied."""
    told, other = (int(i) for i in rng.permutation(len(CLASSES))[:2])
    label = told if rng.random() < 0.8 else int(rng.integers(len(CLASSES)))
    word, denied = rng.choice(TELLING[CLASSES[told]]), rng.choice(TELLING[CLASSES[other]])
    said = rng.choice([f"not {denied} but {word}", f"{word} but not {denied}", f"{word} and never {denied}"])
    return f"{rng.choice(OPENERS)} the {{shop}} {rng.choice(PRODUCTS)} is {said}", label


def messages(tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, Dataset]:
    """Tokenized rows by part of `SIZES`; no message is in two, whatever its shop. In ``forget`` the shop is that of the class."""
    rng, drawn = np.random.default_rng(seed), {}
    while len(drawn) < sum(SIZES.values()):
        text, label = message(rng)
        drawn[text] = label
    pool, parts = iter(drawn.items()), {}
    for part, size in SIZES.items():
        rows = []
        for i, (text, label) in zip(range(size), pool):
            shops = {"forget": [SHOPS[label]], "test": SHOPS}.get(part, [str(rng.choice(SHOPS))])
            rows += [{"text": text.format(shop=shop), "label": label, "shop": shop, "message": i} for shop in shops]
        parts[part] = encode(Dataset.from_list(rows, features=FEATURES), tokenizer, "input_ids")
    return parts


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word; what is padded is padded on the left."""
    phrases = [
        *SHOPS,
        *OPENERS,
        *PRODUCTS,
        "the is not but and never",
        *(word for words in TELLING.values() for word in words),
    ]
    words = ["[PAD]", "[UNK]", "[END]", *sorted({word for phrase in phrases for word in phrase.split()})]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", padding_side="left"
    )


def small_decoder(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Two layers, 64 wide."""
    return Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=128, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
        )
    )  # fmt: skip


def row(model: nn.Module, test: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracy, also where the shop stands for another class, how often that class is the answer there, and so on."""
    told = np.array([SHOPS.index(shop) for shop in test.with_format(None)["shop"]])
    return bias_row(*predict(model, test, tokenizer), told)


def main(
    steps: int = 200, train_steps: int = 200, seed: int = 0, output_dir: str = "out/decoder_bias"
) -> tuple[dict[str, dict], str]:
    """Unlearn the shop; prints and returns a row of each model, and the audit's verdict.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the messages and of every training.
        output_dir: for the trainers.
    """
    tokenizer = word_tokenizer()
    sets = messages(tokenizer, seed)
    set_seed(seed)
    settings = dict(per_device_train_batch_size=64, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    fit = lambda model, rows: retrain(model, rows, training, processing_class=tokenizer)
    start = fit(small_decoder(tokenizer), sets["pretrain"])
    original = fit(start, concatenate_datasets([sets["forget"], sets["retain"]]))

    return compare(
        original,
        retrained=fit(start, sets["retain"]),
        row=lambda model: row(model, sets["test"], tokenizer),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=sets["test"], bias_column="shop", example_column="message"),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["unseen"],
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
