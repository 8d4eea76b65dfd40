"""The methods: tensors in, decisions out. No model code, no hooks, no cache surgery, no transformers."""
