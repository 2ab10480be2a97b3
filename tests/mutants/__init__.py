"""Small wrong changes, each of which a test must catch; see docs/testing.md."""
