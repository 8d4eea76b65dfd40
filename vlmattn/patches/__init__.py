"""How a decision reaches a model: the only code that knows transformers."""
