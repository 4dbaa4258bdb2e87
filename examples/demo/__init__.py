"""`python -m examples.demo`: a quick start; `python -m examples.demo.full`: verifies all our claims."""
