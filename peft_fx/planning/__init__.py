"""From a model's modules and a config to a plan: which method on which target, with which tensors. Plain data."""
