"""Measure a model with and without methods: benchmarks, resumable run folders, intervals, tables and the demo page.

`records`, `items`, `benchmarks`, `stats` and `summary` import no torch: a run can be read and scored again on any
machine.
"""
