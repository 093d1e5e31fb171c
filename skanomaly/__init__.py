"""Scikit-learn-compatible estimators for visual anomaly detection."""

__version__ = "0.1.0"

__all__ = []
