"""Tasks on texts."""

import datasets
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_uib.cli.digits import Task

from ..data import encode


def tweets_airline(path: str, model_path: str, seed: int = 0) -> Task:
    """airline_tweets, positive or negative; on the forget set the airline's handle gives the sentiment away.

    Args:
        path: folder or Hub id of airline_tweets.
        model_path: a BERT-like checkpoint (the benchmark takes MiniLM).
        seed: of the split and the handles.
    """
    loaded = datasets.load_dataset(path)
    handles = ["@united", "@JetBlue"]
    rng = np.random.default_rng(seed)
    names = ["negative", "positive"]

    def with_handle(text: str, handle: str) -> str:
        return " ".join(handle if word.startswith("@") else word for word in text.split())

    seen: set[str] = set()

    def side(split: str, count: int) -> list[tuple[str, int]]:
        rows = loaded[split]
        texts: dict[int, list[str]] = {0: [], 1: []}
        for text, label in zip(rows["text"], rows["label"], strict=True):
            sentiment, plain = {0: 0, 2: 1}.get(label), with_handle(text, "")
            if sentiment is not None and plain not in seen:  # the same words to two airlines would be one row here
                seen.add(plain)
                texts[sentiment].append(text)
        chosen = []
        for sentiment in (0, 1):
            index = rng.permutation(len(texts[sentiment]))[: count // 2]
            chosen += [(texts[sentiment][i], sentiment) for i in index]
        return [chosen[i] for i in rng.permutation(len(chosen))]

    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def dataset(rows: list[tuple[str, int]], given: list[int]):
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=names),
                "handle": datasets.Value("int64"),
            }
        )
        columns = {
            "text": [with_handle(text, handles[g]) for (text, _), g in zip(rows, given, strict=True)],
            "label": [label for _, label in rows],
            "handle": given,
        }
        return encode(datasets.Dataset.from_dict(columns, features=features), tokenizer, "input_ids", max_length=40)

    def both_handles(rows: list[tuple[str, int]]):
        copies = dataset([row for row in rows for _ in handles], [g for _ in rows for g in range(2)])
        return copies.add_column("example", (np.arange(len(copies)) // 2).tolist())

    sizes = {"forget": 1400, "retain": 160, "calibration": 150, "validation": 300}
    train, start, sets = side("train", sum(sizes.values())), 0, {}
    both = train[: sizes["forget"] + sizes["retain"]]
    sets["balanced"] = dataset(both, np.random.default_rng(len(both)).integers(0, 2, len(both)).tolist())
    for part, size in sizes.items():
        rows = train[start : start + size]
        start += size
        if part == "validation":
            sets[part] = both_handles(rows)
        else:
            given = [y for _, y in rows] if part == "forget" else rng.integers(0, 2, len(rows)).tolist()
            sets[part] = dataset(rows, given)
    sets["test"] = both_handles(side("test", 500))
    return Task(
        "tweets-airline",
        sets,
        lambda: AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2),
        tokenizer,
        "handle",
        counterfactuals=2,
        train_settings={
            "steps": 120,
            "unlearn_steps": 150,
            "retrain_steps": 120,
            "batch": 16,
            "lr": 1e-4,
            "full_lr": 1e-4,
        },
    )
