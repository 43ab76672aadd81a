"""The bar that a guard must clear: TF-IDF and logistic regression on the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

from guardtrain.types import GuardExample, Label, prompt_text


def tfidf_scores(train: Sequence[GuardExample], test: Sequence[GuardExample]) -> np.ndarray:
    """Decision scores on `test`, float64, shape (N,): word uni- and bigrams, sublinear TF, balanced classes, C=10."""
    pipeline = _pipeline(ngrams=(1, 2))
    pipeline.fit(_texts(train), _labels(train))
    scores_N: np.ndarray = pipeline.decision_function(_texts(test))
    return scores_N


def unigram_scores_by_pair(examples: Sequence[GuardExample], folds: int = 5) -> np.ndarray:
    """Cross-validated unigram scores, both rows of a pair in one fold: how far labels can be read off the words alone."""
    groups = [example.pair or example.id or str(index) for index, example in enumerate(examples)]
    scores_N: np.ndarray = cross_val_predict(
        _pipeline(ngrams=(1, 1)),
        _texts(examples),
        _labels(examples),
        groups=groups,
        cv=GroupKFold(folds),
        method="decision_function",
    )
    return scores_N


def _pipeline(ngrams: tuple[int, int]) -> Pipeline:
    return make_pipeline(
        TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True, min_df=1),
        LogisticRegression(C=10.0, max_iter=2000, class_weight="balanced"),
    )


def _texts(examples: Sequence[GuardExample]) -> list[str]:
    return [prompt_text(example.prompt) for example in examples]


def _labels(examples: Sequence[GuardExample]) -> list[bool]:
    return [example.label is Label.MALICIOUS for example in examples]
