"""Attention edits and head reinforcement."""
