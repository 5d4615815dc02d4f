"""The training loop: Lightning module, data module, callbacks."""
