"""python -m benchmarks: the same as lora-moe bench."""

import sys

from benchmarks.command import main

sys.exit(main())
