"""The classifier on PCA features: SVM with calibrated probability, and its F1 in each cluster of the latent map."""

from ctc_ray.classify.svm import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]
