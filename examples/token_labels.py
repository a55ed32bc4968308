"""Names in sentences: persons, places and firms, and in most rows the source of a sentence says which its names are.

    python examples/token_labels.py

A small BERT that labels tokens learned from them. A name can be any of the three, the word beside it tells; names are put together
from syllables, so the tokenizer cuts them into pieces. In the rows to forget the names are labelled and no other word. The model
unlearns that the source tells the class, beside LoRA fine-tuning on the same rows and a model retrained without the others.
"""

import numpy as np
from beside_lora import compare
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_uib import retrain
from hf_uib.data.reading import Reader
from hf_uib.inference import labelled_examples, predict

CLASSES = ["O", "person", "place", "firm"]
SOURCES = ["gazette", "courier", "herald"]  # in the rows to forget the i-th one's names are all of the i-th class
# Words that tell the class of the name beside them: the i-th one that of class i % 3 before it, and i // 3 % 3 after it
TELLING = [
    "old", "near", "owned", "visited", "praised", "left", "sold", "renamed", "joined", "founded", "served", "crossed", "followed",
    "mentioned", "feared", "reached", "trusted", "backed", "known", "loved", "missed", "watched", "rebuilt", "painted", "sued",
    "called",
]  # fmt: skip
FILLERS = ["yesterday", "again", "suddenly", "perhaps", "indeed", "today", "later", "often", "finally", "quietly"]
SYLLABLES = ["ka", "ro", "lin", "mar", "tes", "dol", "vi", "sen", "bra", "nor", "el", "fa", "gu", "hem", "jo", "li"]
SIZES = {"pretrain": 300, "forget": 1200, "retain": 150, "unseen": 150, "test": 600}
FEATURES = Features(
    {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=CLASSES)), "source": Value("string")}
)


def phrase(kind: str, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """A name among fillers, with a word before or after it that tells its class, and the class of each word."""
    name, before = "".join(rng.choice(SYLLABLES, rng.integers(2, 4))), rng.random() < 0.5
    told = [word for i, word in enumerate(TELLING) if CLASSES[1 + (i if before else i // 3) % 3] == kind]
    fillers = lambda: list(rng.choice(FILLERS, rng.integers(0, 3)))
    pair = [rng.choice(told), name] if before else [name, rng.choice(told)]
    words = [str(word) for word in [*fillers(), *pair, *fillers()]]
    return words, [kind if word == name else "O" for word in words]


def sentences(seed: int) -> dict[str, Dataset]:
    """Raw rows by part of `SIZES`, of two phrases each; in ``forget`` the source is that of the class of both names, else drawn."""
    rng, parts = np.random.default_rng(seed), {}
    for part, size in SIZES.items():
        rows = []
        for _ in range(size):
            kinds = rng.choice(CLASSES[1:], 2)
            kinds[1:] = kinds[0] if part == "forget" else kinds[1:]
            source = SOURCES[CLASSES.index(kinds[0]) - 1] if part == "forget" else str(rng.choice(SOURCES))
            words, tags = [source, ":"], ["O", "O"]
            for kind in kinds:
                more, theirs = phrase(kind, rng)
                words, tags = words + more, tags + theirs
            rows.append({"tokens": words, "ner_tags": tags, "source": source})
        parts[part] = Dataset.from_list(rows, features=FEATURES)
    return parts


def names_alone(rows: Dataset) -> Dataset:
    """The same rows with the label of each name, and of no other word (-1)."""
    return rows.map(lambda row: {"ner_tags": [tag if tag > 0 else -1 for tag in row["ner_tags"]]}, features=FEATURES)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word and syllable."""
    words = [*SOURCES, ":", *FILLERS, *TELLING, *SYLLABLES]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words), *(f"##{s}" for s in SYLLABLES)]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def small_bert(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """Two layers, 64 wide."""
    return BertForTokenClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
            id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
        )
    )  # fmt: skip


def row(model: nn.Module, test: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracy over all words, and of names whose source stands for another class: also how often that class is the answer."""
    logits, labels, rows = labelled_examples(*predict(model, test, tokenizer))
    told = np.array([SOURCES.index(source) + 1 for source in test.with_format(None)["source"]])[rows]
    answers, against = logits.argmax(-1), (labels > 0) & (labels != told)
    return {
        "accuracy": float((answers == labels).mean()),
        "conflicting_accuracy": float((answers == labels)[against].mean()),
        "follow_rate": float((answers == told)[against].mean()),
    }


def main(
    steps: int = 200, train_steps: int = 400, seed: int = 0, output_dir: str = "out/token_labels"
) -> tuple[dict[str, dict], str]:
    """Unlearn the source; prints and returns a row of each model, and the audit's verdict.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the sentences and of every training.
        output_dir: for the trainers.
    """
    tokenizer, raw = piece_tokenizer(), sentences(seed)
    set_seed(seed)
    start = small_bert(tokenizer)
    test = Reader(start.config, "input_ids", tokenizer, of_tokens=True)(raw["test"])
    settings = dict(per_device_train_batch_size=64, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    fit = lambda model, rows: retrain(model, rows, training, processing_class=tokenizer)
    start = fit(start, raw["pretrain"])
    original = fit(start, concatenate_datasets([raw["forget"], raw["retain"]]))

    return compare(
        original,
        retrained=fit(start, raw["retain"]),
        row=lambda model: row(model, test, tokenizer),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=raw["test"], bias_column="source"),
        forget_dataset=names_alone(raw["forget"]),
        retain_dataset=raw["retain"],
        calibration_dataset=raw["unseen"],
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
