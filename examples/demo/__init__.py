"""`python -m examples.demo`: a first success; `python -m examples.demo.full`: all that we claim of it."""
