"""Attention arithmetic: one call, several implementations. Imports torch, triton and the edits (plain data)."""
