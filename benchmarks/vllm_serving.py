"""Decoding in vLLM, tokens per second: a mixture, the base alone, and one plain LoRA of equal active rank.

    build/vllm/bin/python -m benchmarks.vllm_serving build/demo-vllm     (make demo-vllm first)

Each contender is an engine in its own process; they take turns, round by round, so that other load on the
machine affects all of them equally.  Prints medians over rounds, ratios to the base, and the time to the
first token.  The plain LoRA has random weights: only their sizes matter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from examples.serving.server import ENVIRONMENT

PROMPT = 32  # tokens
CONTENDERS = ("base", "mixture", "plain LoRA")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="written by make demo-vllm; asked.json names base and adapter"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    lora = args.folder / "plain-lora"
    told = json.loads((args.folder / "asked.json").read_text())
    plain_lora(told["base"], told["adapter"], lora)
    engines = {name: start(name, args) for name in CONTENDERS}
    try:
        found = {name: [] for name in CONTENDERS}
        for round_ in range(args.rounds + 1):
            for name, engine in engines.items():
                print("go", file=engine.stdin, flush=True)
                measured = answer_of(engine)
                if round_:  # the first is a warmup
                    found[name].append(measured)
    finally:
        for engine in engines.values():
            engine.stdin.close()
            engine.wait(60)
    print(table(found, args))


def start(name, args):
    own = ["--batch", str(args.batch), "--new", str(args.new), "--dtype", args.dtype]
    own += ["--eager"] if args.eager else []
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.vllm_serving", str(args.folder), "--contender", name, *own],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT | alone,
        stderr=open(args.folder / f"bench-{name.replace(' ', '-')}.log", "w"),  # noqa: SIM115
    )  # fmt: skip
    answer_of(engine)  # ready
    return engine


def answer_of(engine):
    for line in engine.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"an engine ended: see the logs bench-*.log ({engine.wait()})")


def contend(args):
    """Answers each line of stdin with one round's numbers."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    told, lora = json.loads((args.folder / "asked.json").read_text()), None
    fields = {"dtype": args.dtype, "max_model_len": 512, "enforce_eager": args.eager}
    fields |= {
        "enable_prefix_caching": False,
        "max_num_seqs": args.batch,
        "disable_log_stats": False,
    }
    if args.contender == "mixture":
        fields["load_format"] = "lora_moe"
        fields["additional_config"] = {"lora_moe": {"adapter": told["adapter"]}}
    elif args.contender == "plain LoRA":
        fields |= {"enable_lora": True, "max_lora_rank": rank_of(told["adapter"])}
        lora = LoRARequest("plain", 1, str(args.folder / "plain-lora"))
    llm = LLM(told["base"], **fields)
    prompts = [
        {"prompt_token_ids": [2 + (7 * i + j) % 1000 for j in range(PROMPT)]}
        for i in range(args.batch)
    ]
    how = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    print("{}", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        outputs = llm.generate(prompts, how, lora_request=lora, use_tqdm=False)
        spent = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == args.new for output in outputs)
        first = [output.metrics.first_token_latency for output in outputs if output.metrics]
        rate = args.batch * args.new / spent
        print(
            json.dumps({"rate": rate, "first": statistics.median(first) if first else None}),
            flush=True,
        )


def rank_of(adapter):
    """The mixture's active rank, summed over its K largest experts, rounded up to a power of two."""
    from lora_moe import adapter_info

    configs = [a["config"] for a in adapter_info(adapter)["adapters"]]
    active = max(sum(sorted(c.ranks)[-c.top_k :]) for c in configs)
    return 1 << (active - 1).bit_length()  # vLLM requires a power of two


def plain_lora(base, adapter, folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_moe import adapter_info

    paths = [path for a in adapter_info(adapter)["adapters"] for path in a["modules"]]
    config = LoraConfig(r=rank_of(adapter), target_modules=paths, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=1e-3)
    model.save_pretrained(folder)


def table(found, args):
    base = statistics.median(m["rate"] for m in found["base"])
    lines = [
        f"decoding {args.batch} x {args.new} tokens, {args.dtype}, {args.rounds} rounds in turn,"
        f" {os.environ.get('OMP_NUM_THREADS', '1')} thread(s)",
        "| | tokens/s | / base | first token |",
        "|---|---|---|---|",
    ]
    for name, measured in found.items():
        rate = statistics.median(m["rate"] for m in measured)
        first = [m["first"] for m in measured if m["first"] is not None]
        seen = f"{1000 * statistics.median(first):.0f} ms" if first else "not measured"
        lines.append(f"| {name} | {rate:.0f} | {rate / base:.2f} | {seen} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
