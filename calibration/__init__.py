"""Calibration: logits in, probabilities that can be bid with out.

Reading order: ``base`` (conventions), ``link``, ``sketch``, ``platt``, ``isotonic``, ``online``,
``segments``, ``delayed``, ``selection``, ``chain``. numpy and scipy only.
"""
