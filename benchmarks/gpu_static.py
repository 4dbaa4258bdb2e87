"""python -m benchmarks.gpu_static: static/gpu_static.py."""

from benchmarks.static.gpu_static import main

if __name__ == "__main__":
    main()
