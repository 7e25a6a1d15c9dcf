"""Human-in-the-loop engine: one loop in which a strategy chooses cells, a labeller answers and the classifier learns."""
