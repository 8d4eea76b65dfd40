"""Attention arithmetic: one call, several implementations. Imports torch and triton only."""
