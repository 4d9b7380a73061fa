"""What a trained network's filters, gradients and Jacobian say about pruning it."""

from .additivity import Additivity
from .diagnose import diagnose
from .jacobian import Spectrum
from .result import Diagnosis, LayerDiagnosis
from .trainability import recorded_accuracies, trainability_accuracy
from .weights import WeightNumbers

__all__ = [
    "Additivity",
    "Diagnosis",
    "LayerDiagnosis",
    "Spectrum",
    "WeightNumbers",
    "diagnose",
    "recorded_accuracies",
    "trainability_accuracy",
]
