"""TF-IDF and logistic regression: learns what words tell, and keeps the rows of a pair in one fold."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score
from tiny_models import guard_row

from guardtrain.evaluate.baseline import tfidf_scores, unigram_scores_by_pair
from guardtrain.types import GuardExample, Label


def is_malicious(rows: list[GuardExample]) -> np.ndarray:
    return np.array([row.label is Label.MALICIOUS for row in rows])


def rows_with_a_telling_word(number: int, word: str = "override") -> list[GuardExample]:
    return [
        guard_row(f"please {word if label == 'malicious' else 'bake'} thing{index}", label, pair=f"p{index}")
        for index in range(number)
        for label in ("malicious", "benign")
    ]


def test_words_that_tell_are_learnt() -> None:
    train, test = rows_with_a_telling_word(12), rows_with_a_telling_word(5)[::-1]
    scores_N = tfidf_scores(train, test)
    assert scores_N.shape == (10,)
    assert roc_auc_score(is_malicious(test), scores_N) == 1.0
    assert (scores_N > 0).tolist() == is_malicious(test).tolist()


def test_pairs_of_words_are_seen_by_the_bar_but_not_by_the_leak_test() -> None:
    """Two words, and only their order tells the label."""
    texts = {"malicious": "alpha beta", "benign": "beta alpha"}
    rows = [guard_row(texts[label], label, pair=f"p{n}") for n in range(10) for label in texts]
    assert roc_auc_score(is_malicious(rows), tfidf_scores(rows, rows)) == 1.0
    assert np.abs(unigram_scores_by_pair(rows)).max() < 1e-6


def test_the_rows_of_a_pair_stay_in_one_fold() -> None:
    """Each pair is one text with both labels, so whole pairs teach nothing at all: every score is exactly zero.

    Were a pair split, each row would be scored by a model that saw its twin with the other label.
    """
    texts = [f"word{number % 7} thing{number} more{number % 3}" for number in range(30)]
    rows = [guard_row(text, label, pair=f"p{number}") for label in ("malicious", "benign") for number, text in enumerate(texts)]
    assert np.abs(unigram_scores_by_pair(rows)).max() < 1e-6
    unpaired = [guard_row(row.prompt[0].content, row.label) for row in rows]
    assert np.abs(unigram_scores_by_pair(unpaired)).max() > 0.1


def test_the_leak_test_finds_words_that_tell() -> None:
    rows = rows_with_a_telling_word(20)
    assert roc_auc_score(is_malicious(rows), unigram_scores_by_pair(rows)) == 1.0


def test_no_row_is_scored_by_a_model_that_saw_it() -> None:
    """Random labels on unique words: scored by itself a row would be right every time."""
    rng = np.random.default_rng(0)
    rows = [guard_row(f"w{n}a w{n}b w{n}c", "malicious" if rng.random() < 0.5 else "benign", pair=f"p{n}") for n in range(80)]
    assert roc_auc_score(is_malicious(rows), unigram_scores_by_pair(rows)) < 0.7
