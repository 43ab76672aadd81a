"""The proxy: does the model still tell malicious prompts from benign ones? A linear classifier over its hidden states.

Fitted once on the untouched model and frozen. Shape suffixes: N prompts, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """How a probe does on some prompts.

    mean_margin: the mean distance to its plane, on the right side positive, in standardised units.
    kept_auroc: the smallest of three: AUROC, that of malicious prompts as they are now against benign ones as the untouched model
    had them, and that of benign ones now against malicious ones then. A disturbance that moves all prompts to one side leaves
    AUROC as it was, and this not. Unlike accuracy, which moves by whole prompts, it is a mean over all pairs.
    """

    balanced_accuracy: float
    auroc: float
    mean_margin: float
    kept_auroc: float

    def said(self) -> str:
        """In one line."""
        return f"balanced accuracy {self.balanced_accuracy:.3f}, AUROC {self.auroc:.3f}, mean margin {self.mean_margin:.2f}"


@dataclass(frozen=True)
class Probe:
    """A plane through standardised hidden states."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    weight_D: np.ndarray
    bias: float

    def margins(self, features_ND: np.ndarray) -> np.ndarray:
        """Signed distance of each prompt to the plane, malicious positive; of shape (N,)."""
        standard_ND = (features_ND.astype(np.float64) - self.mean_D) / self.scale_D
        # A probe that found nothing has no direction: every prompt is at its plane or on one side of it.
        return np.asarray((standard_ND @ self.weight_D + self.bias) / (np.linalg.norm(self.weight_D) or 1.0))

    def figures(self, features_ND: np.ndarray, is_malicious_N: np.ndarray, before_N: np.ndarray) -> ProbeFigures:
        """before_N: margins of the untouched model. Raises ValueError where a class is missing."""
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score

        margins_N = np.nan_to_num(self.margins(features_ND), nan=0.0, posinf=1e30, neginf=-1e30)  # a broken model may overflow
        sides_N = np.where(is_malicious_N, 1.0, -1.0)
        mixed = (np.where(is_moved_N, margins_N, before_N) for is_moved_N in (is_malicious_N, ~is_malicious_N))
        auroc, *crossed = (float(roc_auc_score(is_malicious_N, each_N)) for each_N in (margins_N, *mixed))
        return ProbeFigures(
            balanced_accuracy=float(balanced_accuracy_score(is_malicious_N, margins_N > 0)),
            auroc=auroc,
            mean_margin=float((margins_N * sides_N).mean()),
            kept_auroc=min(auroc, *crossed),
        )


def fit_probe(features_ND: np.ndarray, is_malicious_N: np.ndarray) -> Probe:
    """Standardised logistic regression, its regularisation chosen by five-fold cross-validation on these prompts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    choices = {"logisticregression__C": np.logspace(-5, 0, 6)}
    search = GridSearchCV(model, choices, cv=5, scoring="neg_log_loss").fit(features_ND.astype(np.float64), is_malicious_N)
    scaler, fitted = search.best_estimator_
    return Probe(scaler.mean_, scaler.scale_, fitted.coef_[0], float(fitted.intercept_[0]))
