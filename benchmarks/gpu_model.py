"""python -m benchmarks.gpu_model: static/gpu_model.py."""

from benchmarks.static.gpu_model import main

if __name__ == "__main__":
    main()
