"""Cost of a training step: ours, dense stacked matmuls, a loop over experts, PEFT LoRA."""

import math
from functools import partial

from tqdm import tqdm

from benchmarks import timing
from examples.common import measure, peers, training
from examples.demo.learning import LEARNING_RATE, SEED


def cost(model, start, batch, rounds):
    """Seconds, saved bytes above the un-adapted model, and peak bytes of each contender's training step."""
    contenders = {
        "ours": peers.ours(model, start),
        "dense stacked": peers.stacked(model, start),
        "loop over experts": peers.loop(model, start),
        "PEFT LoRA, r=16": peers.peft_lora(model, SEED),
    }
    plain = measure.saved_bytes_unadapted(model, batch)
    saved = {name: measure.saved_bytes(m, batch) - plain for name, m in contenders.items()}
    steps = {
        name: partial(training.train_step, m, training.optimizer_of(m, LEARNING_RATE), batch)
        for name, m in contenders.items()
    }
    seconds = timing.interleave(steps, rounds, timing.once, laggard=math.inf)
    measure.return_memory_at_once()
    peak = {name: measure.peak_bytes(step) for name, step in tqdm(steps.items(), "memory")}
    rows = {
        name: {"seconds": seconds[name], "saved_bytes": saved[name], "peak_bytes": peak[name]}
        for name in contenders
    }
    return {"tokens": batch[0].numel(), "unadapted_saved_bytes": plain, "contenders": rows}
