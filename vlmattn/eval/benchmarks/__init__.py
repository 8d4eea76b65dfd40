"""One benchmark, one file: items, parser profiles and metrics as pure functions, without a model or a network."""
