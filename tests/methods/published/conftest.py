"""The scripts need transformers and Pillow."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformers") and find_spec("PIL") else ["test_*.py"]
