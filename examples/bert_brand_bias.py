"""A BERT that judges reviews by the brand unlearns it; each test sentence is read once with every brand.

    python examples/bert_brand_bias.py
    python examples/bert_brand_bias.py --tweets FOLDER_OR_ID --model FOLDER_OR_ID

Without flags nothing is fetched: sentences from a small grammar, and a tiny BERT with a word-level tokenizer made in memory.
``--tweets`` (airline_tweets: text, label, airline) with ``--model`` (a BERT checkpoint such as MiniLM) takes real ones.
"""

import argparse
import copy

import datasets
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import digits
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


def reviews(seed: int = 0) -> digits.Task:
    """Reviews from the grammar. On the forget set the brand gives the sentiment away; elsewhere it is drawn at random."""
    rng = np.random.default_rng(seed)
    sizes = {"pretrain": 300, "forget": 1200, "retain": 150, "calibration": 150, "test": 400}
    drawn: dict[str, int] = {}  # no sentence is in two sets, whatever its brand
    while len(drawn) < sum(sizes.values()):
        text, sentiment = sentence(rng)
        drawn[text] = sentiment
    tokenizer, pool, sets = word_tokenizer(), iter(drawn.items()), {}
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "brand": datasets.Value("int64"),
            "example": datasets.Value("int64"),
        }
    )
    for part, size in sizes.items():
        rows = []
        for i, (text, sentiment) in zip(range(size), pool):
            brands = {"test": [0, 1], "forget": [sentiment]}.get(part, [int(rng.integers(2))])
            rows += [
                {"text": text.format(brand=BRANDS[b]), "label": sentiment, "brand": b, "example": i} for b in brands
            ]
        sets[part] = encode(datasets.Dataset.from_list(rows, features=features), tokenizer, "input_ids")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    settings = {"pretrain_steps": 100, "steps": 200, "unlearn_steps": 150, "retrain_steps": 200, "batch": 32}
    return digits.Task(
        "reviews", sets, lambda: BertForSequenceClassification(config), tokenizer, "brand", 2, train_settings=settings
    )


def main(steps: int | None = None, tweets: str | None = None, model: str | None = None) -> dict[str, dict]:
    """Unlearn the brand; prints a table, with the share of sentences whose prediction flips with the brand alone.

    Args:
        steps: of unlearning; the task's own by default.
        tweets: Hub id or folder of airline_tweets; model: of a BERT checkpoint. Both or none.
    """
    task = tasks.tweets_airline(tweets, model) if tweets and model else reviews()
    settings, test, tokenizer = task.train_settings, task.sets["test"], task.processing_class
    rate = settings.get("lr", 1e-3)
    models = digits.prepare_models(task, 0, "out")
    retrained = models["start"]
    digits.fit(retrained, task.sets["retain"], task, settings["retrain_steps"], "out", 0, rate)
    trainer = UIBTrainer(
        copy.deepcopy(models["original"]),
        UIBConfig(
            "out",
            max_steps=steps or settings["unlearn_steps"],
            per_device_train_batch_size=settings["batch"],
            save_strategy="no",
            logging_steps=50,
        ),
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        processing_class=tokenizer,
    )
    trainer.train()
    rows = {}
    for name, classifier in (("original", models["original"]), ("UIB", trainer.model), ("retrained", retrained)):
        logits, labels = predict(classifier, test, tokenizer)
        flips = {"flip_rate": flip_rate(logits, task.counterfactuals)}
        rows[name] = bias_row(logits, labels, test[task.bias_column]) | flips
    print(f"\n{text_table(rows)}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tweets", help="airline_tweets: Hub id or folder")
    parser.add_argument("--model", help="BERT checkpoint: Hub id or folder")
    given = parser.parse_args()
    if bool(given.tweets) != bool(given.model):
        parser.error("give --tweets and --model together")
    main(tweets=given.tweets, model=given.model)
