"""Evaluation: accuracies of models and adapters, and how two of them differ. It knows nothing of training."""
