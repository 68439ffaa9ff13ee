"""Models: numbers in, logits out."""
