"""The support vector machine of the loop: many small fits on one matrix of squared distances.

A loop fits the same cells a hundred times on changing subsets, and only `predict` matters. One matrix of squared distances
serves all subsets; the kernel matrix cannot be shared, because gamma follows from the rows of each fit. The fit calls
libsvm below scikit-learn's `SVC`: checking arguments takes `SVC` three times as long as libsvm needs for 100 rows. The
low-level function is no public interface, so `fit` falls back to `SVC` where it is gone or has changed, and the tests
hold the predictions to those of `SVC(kernel="rbf", C=1, gamma="scale", class_weight="balanced")`.

Source: reference implementation, `define_and_fit_classifier` (without the probability fit, which `predict` never uses).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.svm import SVC

from ctc_ray.hil.pools import Floats, Ints, Labels

try:
    from sklearn.svm import _libsvm
except ImportError:  # a scikit-learn that has moved it
    _libsvm = None


@dataclass(frozen=True, eq=False)
class Decision:
    """A fitted decision function f(x) = sum_s dual_s exp(-gamma |x - x_s|^2) + intercept; CTC where it is above zero.

    Attributes:
        support: (S,) int64 rows of the training set that are support vectors.
        dual: (S,) float64 coefficients; empty where the training labels have one class.
        intercept: offset.
        gamma: width of the kernel.
    """

    support: Ints
    dual: Floats
    intercept: float
    gamma: float


def squared_distances(rows: Floats, columns: Floats) -> Floats:
    """Squared Euclidean distances.

    Args:
        rows: (M, D) features.
        columns: (N, D) features.

    Returns:
        (M, N) float64, not below zero.
    """
    norms: Floats = np.einsum("md,md->m", rows, rows)[:, None] + np.einsum("nd,nd->n", columns, columns)
    norms -= 2.0 * (rows @ columns.T)
    np.maximum(norms, 0.0, out=norms)
    return norms


def pairwise_squared_distances(features: Floats) -> Floats:
    """Squared distances (N, N) of features (N, D) to each other; the diagonal is exactly zero.

    libsvm subtracts the same products, so its diagonal is zero too. A diagonal of 1e-14 sends its optimiser another way and moves
    decision values by 1e-4: enough to turn a prediction now and then.
    """
    gram = features @ features.T
    norms = np.diag(gram).copy()
    squared: Floats = norms[:, None] + norms - 2.0 * gram
    np.maximum(squared, 0.0, out=squared)
    return squared


def gamma_scale(features: Floats) -> float:
    """Kernel width of `gamma="scale"`: 1 / (D var), where var is that of all entries; 1 for constant features."""
    variance = float(np.ascontiguousarray(features).var())
    return 1.0 / (features.shape[1] * variance) if variance > 0 else 1.0


def rbf_kernel(squared: Floats, gamma: float, out: Floats | None = None) -> Floats:
    """Kernel values exp(-gamma d^2) of the same shape, in `out` (which may be `squared` itself) or in a new array."""
    kernel: Floats = np.multiply(squared, -gamma, out=out)
    np.exp(kernel, out=kernel)
    return kernel


def fit(kernel: Floats, labels: Labels, gamma: float) -> Decision:
    """Fit a balanced C-SVC with C = 1 on a kernel matrix.

    Args:
        kernel: (N, N) float64 kernel values of the training rows.
        labels: (N,) 0 or 1. With one class alone nothing is fitted: the decision is that class everywhere.
        gamma: width that the kernel was computed with; kept for later use.

    Returns:
        The decision function; its support indices are rows of `kernel`.
    """
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        sign = 1.0 if counts[1] else -1.0
        return Decision(np.empty(0, np.int64), np.empty(0), sign, gamma)
    fitted = _fit_libsvm(np.ascontiguousarray(kernel), labels.astype(np.float64), len(labels) / (2.0 * counts))
    if fitted is None:
        model = SVC(kernel="precomputed", class_weight="balanced").fit(kernel, labels)
        return Decision(model.support_.astype(np.int64), model.dual_coef_[0], float(model.intercept_[0]), gamma)
    support, dual, intercept = fitted
    return Decision(support, dual, intercept, gamma)


def _fit_libsvm(kernel: Floats, targets: Floats, class_weight: Floats) -> tuple[Ints, Floats, float] | None:
    low_level: Any = getattr(_libsvm, "fit", None)
    if low_level is None:
        return None
    try:
        _libsvm.set_verbosity_wrap(0)  # below SVC, libsvm prints every fit
        # libsvm's first class is 0, so its decision is positive for non-CTCs: signs are turned, as SVC does.
        support, _, _, dual, intercept, *_ = low_level(
            kernel, targets, svm_type=0, kernel="precomputed", C=1.0, class_weight=class_weight, cache_size=200.0
        )
    except (TypeError, AttributeError):  # other arguments or names in another version
        return None
    return support.astype(np.int64), -np.asarray(dual)[0], -float(intercept[0])


def decide(kernel_to_support: Floats, decision: Decision) -> Floats:
    """Decision values.

    Args:
        kernel_to_support: (M, S) kernel values between cells and the support vectors, in the order of `decision.support`.
        decision: a fitted decision function.

    Returns:
        (M,) float64; a cell is called CTC where the value is above zero.
    """
    values: Floats = kernel_to_support @ decision.dual + decision.intercept
    return values


@dataclass(frozen=True, eq=False)
class Classifier:
    """A decision function with its support vectors, ready for any cell."""

    decision: Decision
    support_vectors: Floats

    @classmethod
    def fit(cls, features: Floats, labels: Labels) -> Classifier:
        """Fit on features (N, D) and labels (N,) 0 or 1."""
        gamma = gamma_scale(features)
        decision = fit(rbf_kernel(pairwise_squared_distances(features), gamma), labels, gamma)
        return cls(decision, features[decision.support])

    def decision_function(self, features: Floats) -> Floats:
        """Decision values (M,) of features (M, D)."""
        if not len(self.decision.support):
            return np.full(len(features), self.decision.intercept)
        kernel = rbf_kernel(squared_distances(features, self.support_vectors), self.decision.gamma)
        return decide(kernel, self.decision)

    def predict(self, features: Floats) -> Labels:
        """Predicted labels (M,) 0 or 1 of features (M, D)."""
        return (self.decision_function(features) > 0).astype(np.int8)
