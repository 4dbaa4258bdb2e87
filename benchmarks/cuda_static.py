"""python -m benchmarks.cuda_static: static/cuda_static.py."""

from benchmarks.static.cuda_static import main

if __name__ == "__main__":
    main()
