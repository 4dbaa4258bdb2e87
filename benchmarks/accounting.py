"""python -m benchmarks.accounting: static/accounting.py."""

from benchmarks.static.accounting import main

if __name__ == "__main__":
    main()
