"""Words that two sets of texts do not share."""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?|[\u2600-\u27bf\U0001f300-\U0001faff]")  # or an emoji
# Chinese and Japanese characters, of which each is a word: no spaces stand between theirs
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
PRIOR = 1000  # words that the prior counts as
FEWEST = 5  # texts that have a word which is named


def words_of(text: str) -> set[str]:
    """The words of a text in lower case.

    >>> sorted(words_of("A red car 真好 🙂"))
    ['a', 'car', 'red', '好', '真', '🙂']
    """
    return set(WORD.findall(UNSPACED.sub(r" \g<0> ", text.lower())))


def telling_words(first: Iterable[str], second: Iterable[str], count: int = 10) -> list[tuple[str, float]]:
    """The words by which the first texts differ most from the second: log-odds with an informative Dirichlet prior (Monroe,
    Colaresi and Quinn, 2008), the prior being all words of both. A word counts once a text.

    Returns:
        Words and z-values, the largest first; those above 0 alone.

    >>> telling_words(["a red car"] * 9 + ["a car"], ["a car"] * 10)[0][0]
    'red'
    """
    a, b = (Counter(word for text in texts for word in words_of(text)) for texts in (first, second))
    names = sorted(word for word, n in (a + b).items() if n >= FEWEST)
    if len(names) < 2:
        return []
    counts = np.array([[side[word] for word in names] for side in (a, b)], dtype=float)
    totals = np.array([[side.total()] for side in (a, b)], dtype=float)
    prior = counts.sum(0) / totals.sum() * PRIOR
    with_prior, total = counts + prior, totals + PRIOR
    log_odds = np.log(with_prior) - np.log(total - with_prior)
    z = (log_odds[0] - log_odds[1]) / np.sqrt((1 / with_prior).sum(0))
    best = [i for i in np.argsort(-z, kind="stable")[:count] if z[i] > 0]
    return [(names[i], float(z[i])) for i in best]
