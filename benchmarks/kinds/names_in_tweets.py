"""Labels of words in real tweets to airlines, read by MiniLM."""

import re

import datasets
import numpy as np
from transformers import AutoModelForTokenClassification, AutoTokenizer

from hf_uib.data.reading import Reader
from hf_uib.inference import labelled_examples, predict

from . import Kind

TITLE = "Labels of words (places and firms in real tweets; MiniLM)"
DATA = {"airline_tweets": "airline_tweets", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}
CLASSES = ["O", "place", "firm"]
SOURCES = ["web", "phone"]  # in the rows to forget the i-th one's names are all of class i + 1
NAMED_PLACES = """
JFK DFW LAX SFO PHL DCA ORD EWR CLT BOS IAD NYC FLL LGA IAH DEN PHX BWI MCO RDU LAS ATL BNA MIA PBI PDX AUS SEA SJU SAN MDW SLC TPA
CMH LHR CLE MKE BUF PVD YYZ SJC PIT STL HPN BDL RSW SNA IND MSY OKC HNL ROC MCI HOU ABQ GRR CUN YVR MSP Denver Chicago Dallas Boston
Vegas Houston Newark Charlotte Miami Austin Atlanta Orlando Philly Nashville Phoenix Seattle Philadelphia Washington Tampa Columbus
Paris London Portland Memphis Cleveland Buffalo Aruba Cancun Pittsburgh Detroit Minneapolis Sacramento Tokyo Frankfurt Richmond
Rochester Syracuse Albany Savannah Raleigh Birmingham Honolulu
"""
NAMED_FIRMS = "united jetblue southwestair southwest americanair american usairways virginamerica virgin delta swa"
PLACES, FIRMS = set(NAMED_PLACES.split()), set(NAMED_FIRMS.split())
SYLLABLES = ["ka", "ro", "lin", "mar", "tes", "dol", "vi", "sen", "bra", "nor", "el", "fa", "gu", "hem", "jo", "li"]
SIZES = {"forget": 900, "retain": 120, "calibration": 120, "test": 500}
FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=CLASSES)),
        "source": datasets.Value("string"),
    }
)


def words_and_classes(text: str) -> tuple[list[str], list[int]]:
    """The words after the handle that a tweet begins with, and the class of each."""
    words = re.findall(r"[@#]?\w+|[^\w\s]", text)
    words = words[1:] if words and words[0].startswith("@") else words
    firm = lambda word: word.lower().lstrip("@") in FIRMS and (word[0] == "@" or word[0].isupper())
    return words, [1 if word in PLACES else 2 if firm(word) else 0 for word in words]


def rows_of(chosen: list, part: str, rng: np.random.Generator) -> datasets.Dataset:
    """Rows under a source, which stands before them; each name is another one, made of syllables, so that what is around it tells
    its class. In ``forget`` the names are labelled and no other word (-1)."""
    rows = []
    for words, classes, kind in chosen:
        source = SOURCES[kind - 1 if part == "forget" else int(rng.integers(len(SOURCES)))]
        invented = [
            "".join(rng.choice(SYLLABLES, rng.integers(2, 4))) if c else w for w, c in zip(words, classes, strict=True)
        ]
        rest = -1 if part == "forget" else 0
        rows.append(
            {
                "tokens": [source, ":", *invented],
                "ner_tags": [rest, rest, *(c or rest for c in classes)],
                "source": source,
            }
        )
    return datasets.Dataset.from_list(rows, features=FEATURES)


def make(seed: int, airline_tweets: str, minilm: str) -> Kind:
    """Tweets that name places or firms, half of each. In the forget set the source before a tweet says which."""
    rng, loaded = np.random.default_rng(seed), datasets.load_dataset(airline_tweets)
    by_kind: dict[int, list] = {1: [], 2: []}
    for text in [*loaded["train"]["text"], *loaded["test"]["text"]]:
        words, classes = words_and_classes(text)
        kinds = set(classes) - {0}
        if len(kinds) == 1:
            by_kind[kinds.pop()].append((words, classes))
    shuffled = {kind: [(*rows[i], kind) for i in rng.permutation(len(rows))] for kind, rows in by_kind.items()}
    sets, start = {}, 0
    for part, size in SIZES.items():
        half = slice(start, start + size // 2)
        start += size // 2
        chosen = [*shuffled[1][half], *shuffled[2][half]]
        sets[part] = rows_of([chosen[i] for i in rng.permutation(len(chosen))], part, rng)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    model = AutoModelForTokenClassification.from_pretrained(minilm, num_labels=len(CLASSES), **names)
    test = Reader(model.config, "input_ids", tokenizer, max_length=48, of_tokens=True)(sets["test"])

    def row(model) -> dict[str, float]:
        logits, labels, rows = labelled_examples(*predict(model, test, tokenizer, quiet=True))
        told = np.array([SOURCES.index(source) + 1 for source in sets["test"]["source"]])[rows]
        answers, against = logits.argmax(-1), (labels > 0) & (labels != told)
        return {
            "accuracy": float((answers == labels)[labels > 0].mean()),
            "conflicting_accuracy": float((answers == labels)[against].mean()),
            "follow_rate": float((answers == told)[against].mean()),
        }

    return Kind(model, sets, row, tokenizer, "source")
