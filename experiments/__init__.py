"""Comparisons of settings on the quickstart's task. Each module prints tables; docs/experiments.md has them."""
