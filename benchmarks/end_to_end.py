"""SmolLM2-135M with experts on all its linears: a training step, a generated token, memory.

    lora-moe bench end-to-end [--dtype fp32 bf16] [--repeats 7] [--json FILE] [--markdown FILE]

E=8, r=8, k=2 in ours, in a loop over experts and as dense stacked products, from the same weights; PEFT's
plain LoRA with as many active parameters (r=16); the model without an adapter.  Weights, adapters and
optimizer state all have the same dtype.  A step is forward, backward and AdamW on 480 tokens; without an
adapter it is forward and backward down to the embeddings.  Each contender's peak memory is measured in a
separate process.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import machine, timing
from benchmarks.timing import duration
from examples.common import measure, peers, smollm2, training

SENTENCES, LENGTH = 32, 15
PROMPT, GENERATED = 32, 8
SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {
    "fp32": 1e-3,
    "bf16": 3e-2,
}  # of the losses; the routing flips if two experts nearly tie
STACKED, LOOP, PEFT = "dense stacked", "loop over experts", "PEFT LoRA, r=16"
CONTENDERS = {
    "ours": peers.ours,
    STACKED: peers.stacked,
    LOOP: peers.loop,
    PEFT: lambda model, start: peers.peft_lora(model, SEED),
    "no adapter": lambda model, start: smollm2.share(model),
}
MIXTURES = ("ours", STACKED, LOOP)
PARTS = ("memory", "step", "token")


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak_of(args.peak, args.layers, DTYPES[args.dtype[0]])))
        return 0
    results = {}
    for dtype in args.dtype:
        for result in run(args, dtype):  # after each part: a stopped run keeps its results so far
            results[dtype] = result
            if args.json:
                args.json.write_text(json.dumps(results))
    text = "\n".join(markdown(result) for result in results.values())
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="lora-moe bench end-to-end",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=7, help="interleaved turns")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument(
        "--layers", type=int, help="only the model's first layers, for a quick test"
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args, dtype):
    """Yields and reports {part: {contender: value}} after each part; seconds are lists, one per turn."""
    models = contenders(smollm2.load_model(args.layers, DTYPES[dtype]))
    batch = random_batch()
    check(models, batch, AGREE[dtype])
    result = {"machine": machine.describe(), "repeats": args.repeats, "dtype": dtype}

    def timed(part, calls, clock):
        tell(f"{dtype}, {part}: {args.repeats} turns of {len(calls)} contenders")
        result[part] = timing.interleave(calls, args.repeats, clock, laggard=math.inf)
        tell(f"    {timing.brief(result[part])}")
        return result

    if "memory" in args.parts:
        tell(f"{dtype}, memory: a process for each of {len(models)} contenders")
        result["saved_bytes"] = saved_bytes(models, batch)
        result["peak"] = {name: peak_in_a_process(name, args, dtype) for name in models}
        yield result
    if "step" in args.parts:
        steps = {name: stepper(model, batch) for name, model in models.items()}
        yield timed("step", steps, timing.once)
    if "token" in args.parts:
        tokens = {name: generator(model) for name, model in models.items()}
        yield timed("token", tokens, per_token)


def tell(text):
    print(text, file=sys.stderr, flush=True)


def saved_bytes(models, batch):
    """{name: bytes saved for the backward in excess of the un-adapted model}."""
    plain = measure.saved_bytes_unadapted(models["no adapter"], batch)
    adapted = {name: model for name, model in models.items() if name != "no adapter"}
    return {name: measure.saved_bytes(model, batch) - plain for name, model in adapted.items()}


def per_token(call, calls):
    return timing.once(call, 1) / GENERATED


def contenders(model, names=CONTENDERS):
    """{name: model}: mixtures with the same weights and a nonzero lora_B."""
    start = peers.start_weights(model, SEED)
    generator = torch.Generator().manual_seed(SEED)
    for _, b, _ in start.values():
        b.normal_(0, 0.01, generator=generator)
    return {name: CONTENDERS[name](model, start) for name in names}


def random_batch():
    """ids (N, L), targets (N, L): one target token per sentence, like an answer to a prompt."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1000, 40000, (SENTENCES, LENGTH), generator=generator)
    targets = torch.full_like(ids, -1)
    targets[:, -1] = ids[:, 0]
    return ids, targets


@torch.no_grad()
def check(models, batch, agree):
    """Raises SystemExit unless the losses of the mixtures agree."""
    ours, *others = (training.loss_of(models[name], *batch).item() for name in MIXTURES)
    if not all(abs(ours - other) <= agree * abs(other) for other in others):
        raise SystemExit(f"the mixtures differ: losses {ours}, {others}")


def stepper(model, batch):
    """Returns a training step, or forward and backward for a model without trainable parameters."""
    if any(p.requires_grad for p in model.parameters()):
        return partial(training.train_step, model, training.optimizer_of(model, 1e-4), batch)
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: out.requires_grad_() if torch.is_grad_enabled() else None
    )
    return lambda: training.loss_of(model, *batch).backward()


def generator(model):
    """Returns a function that decodes some tokens greedily after a prompt, with a key-value cache."""
    ids = random_batch()[0].view(1, -1)[:, :PROMPT]
    with torch.no_grad():
        start = model(input_ids=ids, use_cache=True)
    cache, first = start.past_key_values, start.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def generate():
        token = first
        for _ in range(GENERATED):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        cache.crop(PROMPT - cache.get_seq_length())  # negative: drops this many tokens

    return generate


def peak_in_a_process(name, args, dtype):
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--peak", name, "--dtype", dtype]
    for option in ("threads", "layers"):
        value = getattr(args, option)
        command += [f"--{option}", str(value)] if value else []
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(name, layers, dtype):
    """Peak bytes of a step above the level between steps, above the bare model, and of the process."""
    model = smollm2.load_model(layers, dtype)
    measure.return_memory_at_once()
    bare = measure.resident_bytes()
    (adapted,) = contenders(model, [name]).values()
    step = stepper(adapted, random_batch())
    step()  # initializes the optimizer's state
    if bare is None:
        return None
    level = measure.resident_bytes()
    rise = measure.peak_bytes(step)
    return {"a step": rise, "above the bare model": level + rise - bare, "process": level + rise}


def markdown(result):
    """One row per contender, then the claims."""
    columns = [*seconds_columns(result), *bytes_columns(result)]
    lines = [
        f"{result['machine']}; {result['dtype']}; medians of {result['repeats']} interleaved turns, "
        "quartiles in brackets.",
        "",
        f"| | {' | '.join(title for title, _ in columns)} |",
        "|---|" + "---:|" * len(columns),
        *(f"| {n} | {' | '.join(cells.get(n, '') for _, cells in columns)} |" for n in CONTENDERS),
    ]
    return "\n".join([*lines, "", *claims(result)]) + "\n"


def seconds_columns(result):
    for part, other in (("step", PEFT), ("token", "no adapter")):
        seconds = result.get(part, {})
        if seconds:
            yield part, {n: duration(statistics.median(s)) for n, s in seconds.items()}
            yield (
                f"/ {other}",
                {n: f"{timing.ratio(s, seconds[other])}" for n, s in seconds.items()},
            )


def bytes_columns(result):
    if "saved_bytes" in result:
        yield "saved for backward", {n: mebibytes(b) for n, b in result["saved_bytes"].items()}
    peak = {name: found for name, found in result.get("peak", {}).items() if found}
    for kind in next(iter(peak.values()), ()):
        yield f"peak: {kind}", {name: mebibytes(found[kind]) for name, found in peak.items()}


def claims(result):
    """One line per claimed ratio."""
    if "step" in result:
        step = result["step"]
        slower = (timing.ratio(step[name], step["ours"]) for name in (LOOP, STACKED))
        yield f"- step: {timing.ratio(step['ours'], step[PEFT])} times PEFT's"
        yield "- step: the loop {}, dense stacked {} times ours".format(*slower)
    if "token" in result:
        token = result["token"]
        ratio = timing.ratio(token["ours"], token["no adapter"])
        yield f"- token: {ratio} times the un-adapted model's"
    if "saved_bytes" in result:
        saved = result["saved_bytes"]
        yield f"- saved for backward: {saved['ours'] / saved[LOOP]:.3f} times the loop's"
    if result.get("peak", {}).get("ours"):
        ours, plain = (result["peak"][name] for name in ("ours", PEFT))
        ratios = ", ".join(f"{kind} {ours[kind] / plain[kind]:.2f}" for kind in ours)
        yield f"- peak memory, times PEFT's: {ratios}"


def mebibytes(value):
    return "" if value is None else f"{value / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
