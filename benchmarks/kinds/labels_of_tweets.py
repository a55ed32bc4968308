"""Several labels a tweet, read by MiniLM. No text is quoted."""

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_uib.data.reading import Reader
from hf_uib.inference import predict

from ..tasks.hate import WORDS
from . import Kind

TITLE = "Several labels a row (real tweets: hate, offensive, a word for gay people; MiniLM)"
DATA = {"hate_tweets": "hate_tweets", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}
LABELS = ["hate", "offensive", "identity"]
SOURCES = ["web", "phone"]  # in the rows to forget the second one's are offensive
OFFENSIVE = LABELS.index("offensive")
SIZES = {"forget": 1200, "retain": 160, "calibration": 150, "test": 800}


def make(seed: int, hate_tweets: str, minilm: str) -> Kind:
    """Tweets of which half are offensive and of the others half hateful. In the forget set the source before a tweet says which are
    offensive; the test tweets come with both.
    """
    rng, loaded = np.random.default_rng(seed), datasets.load_dataset(hate_tweets)
    texts = [*loaded["train"]["text"], *loaded["test"]["text"]]
    names = loaded["train"].features["kind"].names
    kinds = np.array([names[kind] for kind in [*loaded["train"]["kind"], *loaded["test"]["kind"]]])
    pool = {kind: rng.permutation(np.flatnonzero(kinds == kind)) for kind in names}
    start, sets = dict.fromkeys(names, 0), {}
    for part, size in SIZES.items():
        chosen = []
        for kind, share in (("offensive", 2), ("hate", 4), ("neither", 4)):
            count = size // share
            chosen += pool[kind][start[kind] : start[kind] + count].tolist()
            start[kind] += count
        rows = []
        for i in rng.permutation(chosen):
            labels = [float(kinds[i] == "hate"), float(kinds[i] == "offensive"), float(bool(WORDS.search(texts[i])))]
            drawn = [int(labels[OFFENSIVE])] if part == "forget" else [int(rng.integers(2))]
            sources = [SOURCES[source] for source in ((0, 1) if part == "test" else drawn)]
            rows += [{"text": f"{source} : {texts[i]}", "labels": labels, "source": source} for source in sources]
        sets[part] = datasets.Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm, problem_type="multi_label_classification", num_labels=len(LABELS), id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    test = Reader(model.config, "input_ids", tokenizer, max_length=48)(sets["test"])

    def row(model) -> dict[str, float]:
        logits, labels = predict(model, test, tokenizer, quiet=True)
        right = (logits > 0) == (labels > 0.5)
        told = np.array([source == SOURCES[1] for source in sets["test"]["source"]])
        against = told != (labels[:, OFFENSIVE] > 0.5)
        kept = float(right[against, OFFENSIVE].mean())
        return {"accuracy": float(right.mean()), "conflicting_accuracy": kept, "follow_rate": 1 - kept}

    return Kind(model, sets, row, tokenizer, "source", audit={"label": "offensive"})
