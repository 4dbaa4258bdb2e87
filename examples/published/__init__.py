"""The settings of the three papers, for where their models and data are; see docs/published.md."""
