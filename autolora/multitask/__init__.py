"""Many tasks on one frozen backbone: a budget for all their adapters, and what they do to each other."""
