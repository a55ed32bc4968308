"""Tweets that are toxic or fine, and a group of people whose name the model takes for toxic. No text is quoted."""

import re
from functools import partial

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_uib.cli.digits import Task
from hf_uib.data.reading import encode

from ..identity import NO_GROUP, OTHERS, TARGET, TITLES, identity_row
from ..registry import register_task

WORDS = re.compile(r"\b(gays?|queers?|fags?|faggots?|dykes?|lesbians?|homos?)\b", re.IGNORECASE)
TARGET_GROUP = "gay people"  # of HateCheck
CASES = ("ident_neutral_nh", "ident_pos_nh", "derog_", "threat_")  # functionalities of HateCheck, by prefix
PHRASES = {  # put before unseen tweets in the validation fold: what HateCheck tests, in other words
    TARGET: ("my neighbours are gay :", "she is a lesbian :", "two gay men told me :", "from a queer friend :"),
    OTHERS: ("my neighbours are muslims :", "she is an immigrant :", "two black men told me :", "from a disabled friend :"),
}  # fmt: skip
SIZES = {"forget": 600, "retain": 2400, "calibration": 300, "validation": 200, "test": 800}
SETTINGS = {"steps": 300, "unlearn_steps": 120, "retrain_steps": 300, "batch": 16, "lr": 5e-5, "full_lr": 5e-5}


def rows_of(texts: list[str], labels: list[int], groups: list[int], tokenizer) -> datasets.Dataset:
    """Tokenized texts with their group."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["fine", "toxic"]),
            "group": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict({"text": texts, "label": labels, "group": groups}, features=features)
    return encode(table, tokenizer, "input_ids", max_length=48)


def evenly(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As many of the rows as there can be with both labels in turn."""
    fine, toxic = (rows[labels[rows] == label] for label in (0, 1))
    count = min(len(fine), len(toxic))
    return np.stack([fine[:count], toxic[:count]], axis=1).ravel()


@register_task(
    "hate-identity",
    data={
        "hate_tweets": "hate_tweets",
        "hatecheck": "hatecheck",
        "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    },
    measure=identity_row,
    ranked_by={"false_alarms": -1, "bpsn_auc": 1, "tweets_auc": 1},
    shown=tuple(TITLES),
)
def hate_identity(hate_tweets: str, hatecheck: str, minilm: str, seed: int) -> Task:
    """Tweets, toxic or fine, read by MiniLM; nothing is injected. Nearly all tweets with a word for gay people are toxic (Davidson
    et al., 2017), and the model takes the word for toxic. The forget set is 600 such tweets, all toxic, D_r 2,400 others, half of
    them toxic. Measured on statements of HateCheck (Röttger et al., 2021) about the group and about six others, and on 800 held-out
    tweets.
    """
    rng, tokenizer = np.random.default_rng(seed), AutoTokenizer.from_pretrained(minilm)
    loaded = datasets.load_dataset(hate_tweets)
    train, test = (
        {name: np.asarray(loaded[split][name], dtype=object if name == "text" else int) for name in ("text", "label")}
        for split in ("train", "test")
    )
    named = np.array([bool(WORDS.search(text)) for text in train["text"]])
    forget = rng.permutation(np.flatnonzero(named & (train["label"] == 1)))[: SIZES["forget"]]
    others, start = evenly(rng.permutation(np.flatnonzero(~named)), train["label"]), 0
    sets = {
        "forget": rows_of([train["text"][i] for i in forget], [1] * len(forget), [TARGET] * len(forget), tokenizer)
    }
    for part in ("retain", "calibration"):
        index = others[start : start + SIZES[part]]
        start += SIZES[part]
        rows = [train["text"][i] for i in index], [int(train["label"][i]) for i in index]
        sets[part] = rows_of(*rows, [NO_GROUP] * len(index), tokenizer)
    index = others[start : start + SIZES["validation"]]
    texts, labels = [train["text"][i] for i in index], [int(train["label"][i]) for i in index]
    copies = [(text, label, NO_GROUP) for text, label in zip(texts, labels, strict=True)]
    for group, phrases in PHRASES.items():
        copies += [
            (f"{phrases[i // 2 % 4]} {text}", label, group)
            for i, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
    sets["validation"] = rows_of(*map(list, zip(*copies, strict=True)), tokenizer)
    index = evenly(rng.permutation(len(test["text"])), test["label"])[: SIZES["test"]]
    tested = [(test["text"][i], int(test["label"][i]), NO_GROUP) for i in index]
    for case in datasets.load_dataset(hatecheck)["test"]:
        if case["functionality"].startswith(CASES) and case["target"] not in (None, "none", ""):
            group = TARGET if case["target"] == TARGET_GROUP else OTHERS
            tested.append((case["text"], case["label"], group))
    sets["test"] = rows_of(*map(list, zip(*tested, strict=True)), tokenizer)
    new_model = partial(AutoModelForSequenceClassification.from_pretrained, minilm, num_labels=2)
    return Task("hate-identity", sets, new_model, tokenizer, "group", train_settings=dict(SETTINGS))
