"""Calibrated decoding."""
