"""Calibration: logits in, probabilities that can be bid with out. numpy and scipy only.

Reading order: ``base`` (conventions, and what a calibrator is), ``link``, ``sketch`` and ``quality``,
``fixed`` with ``identity`` and ``sampling``, ``sketch_calibrator`` with ``platt``, ``temperature`` and
``beta`` (all three by ``logistic``), ``isotonic``, ``plain_isotonic``, ``histogram`` and ``decayed``,
``online`` on ``line_filter``, ``delayed``, ``segments`` with ``segment_levels``, ``segment_response``,
``gamma_poisson`` and ``segment_table``, ``selection``, and ``chain``, the one object that the rest of the
program uses.
"""
