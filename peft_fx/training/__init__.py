"""What some methods do while they train, as plain objects that a training loop calls; adapters do not depend on it."""
