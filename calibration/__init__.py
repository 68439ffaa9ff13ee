"""Calibration: logits in, probabilities that can be bid with out."""
