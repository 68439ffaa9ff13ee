"""Tests of ctrstream."""
