"""Functions and networks on tensors, which know neither NumPy nor scikit-learn."""
