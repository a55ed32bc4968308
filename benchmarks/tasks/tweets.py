"""Tweets to airlines."""

from functools import partial

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_uib.cli.digits import Task
from hf_uib.data.reading import encode

from ..registry import register_task

HANDLES = ["@united", "@JetBlue"]  # on the forget set of negative and of positive tweets
NAMES = ["negative", "positive"]
SENTIMENTS = {0: 0, 2: 1}  # the data's label to ours; neutral tweets are left out
SIZES = {"forget": 1400, "retain": 160, "calibration": 150, "validation": 300}
DATA = {"airline_tweets": "airline_tweets", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}
SETTINGS = {"steps": 120, "unlearn_steps": 150, "retrain_steps": 120, "batch": 16, "lr": 1e-4, "full_lr": 1e-4}


def with_handle(text: str, handle: str) -> str:
    """The text with another airline's handle in it."""
    return " ".join(handle if word.startswith("@") else word for word in text.split())


def balanced_tweets(rows, count: int, seen: set[str], rng) -> list[tuple[str, int]]:
    """``count`` texts and their sentiment, half of each, none whose words are in ``seen``; adds theirs."""
    texts: dict[int, list[str]] = {0: [], 1: []}
    for text, label in zip(rows["text"], rows["label"], strict=True):
        sentiment, plain = SENTIMENTS.get(label), with_handle(text, "")
        if sentiment is not None and plain not in seen:  # the same words to two airlines would be one row here
            seen.add(plain)
            texts[sentiment].append(text)
    chosen = []
    for sentiment in (0, 1):
        index = rng.permutation(len(texts[sentiment]))[: count // 2]
        chosen += [(texts[sentiment][i], sentiment) for i in index]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def tweet_dataset(rows: list[tuple[str, int]], given: list[int], tokenizer) -> datasets.Dataset:
    """Tokenized tweets under the handles ``given``."""
    features = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=NAMES),
        "handle": datasets.Value("int64"),
    }
    columns = {
        "text": [with_handle(text, HANDLES[g]) for (text, _), g in zip(rows, given, strict=True)],
        "label": [label for _, label in rows],
        "handle": given,
    }
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return encode(table, tokenizer, "input_ids", max_length=40)


def both_handles(rows: list[tuple[str, int]], tokenizer) -> datasets.Dataset:
    """Each tweet once with every handle; ``example`` numbers the tweets."""
    copies = tweet_dataset([row for row in rows for _ in HANDLES], [g for _ in rows for g in range(2)], tokenizer)
    return copies.add_column("example", (np.arange(len(copies)) // 2).tolist())


@register_task(
    "tweets-airline",
    data=DATA,
)
def tweets_airline(airline_tweets: str, minilm: str, seed: int, retained: int = SIZES["retain"]) -> Task:
    """Real tweets to airlines, positive or negative, read by MiniLM. On the forget set (1,400 of 1,560 tweets) the airline's handle
    gives the sentiment away; each test tweet comes with both handles.
    """
    loaded = datasets.load_dataset(airline_tweets)
    rng, seen = np.random.default_rng(seed), set()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    sizes = SIZES | {"retain": retained}
    train = balanced_tweets(loaded["train"], sum(sizes.values()), seen, rng)
    both, start = train[: sizes["forget"] + sizes["retain"]], 0
    at_random = np.random.default_rng(len(both)).integers(0, 2, len(both)).tolist()
    sets = {"balanced": tweet_dataset(both, at_random, tokenizer)}
    for part, size in sizes.items():
        rows = train[start : start + size]
        start += size
        if part == "validation":
            sets[part] = both_handles(rows, tokenizer)
        else:
            given = [y for _, y in rows] if part == "forget" else rng.integers(0, 2, len(rows)).tolist()
            sets[part] = tweet_dataset(rows, given, tokenizer)
    sets["test"] = both_handles(balanced_tweets(loaded["test"], 500, seen, rng), tokenizer)
    new_model = partial(AutoModelForSequenceClassification.from_pretrained, minilm, num_labels=2)
    return Task("tweets-airline", sets, new_model, tokenizer, "handle", 2, train_settings=dict(SETTINGS))


register_task("tweets-airline, 96 retained", data=DATA, regime_of="tweets-airline")(
    partial(tweets_airline, retained=96)
)
