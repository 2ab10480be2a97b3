"""Random calls of every op against plain computations; see docs/testing.md."""
