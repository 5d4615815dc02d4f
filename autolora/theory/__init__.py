"""Numbers about matrices and activations: pure functions on tensors. torch only."""
