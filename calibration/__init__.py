"""Calibration: logits in, probabilities that can be bid with out. numpy and scipy only.

Reading order: ``base`` (conventions), ``link``, ``sketch`` and ``quality``, ``sampling``, ``platt``,
``isotonic``, ``online``, ``delayed``, ``segments`` with ``segment_levels``, ``segment_response``,
``gamma_poisson`` and ``segment_table``, ``selection``, and ``chain``, the one object that the rest of the
program uses.
"""
