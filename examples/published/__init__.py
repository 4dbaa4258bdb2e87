"""The three papers' experiments in their published settings; see docs/published.md."""
