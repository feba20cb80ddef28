"""From a model to its base graph."""
