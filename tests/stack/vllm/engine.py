"""A process that runs vLLM: `python -m tests.stack.vllm.engine JOB OUT`, both JSON.

JOB {"engine": fields of vllm.LLM, "prompts": [[id, ...], ...], "new": tokens to generate for each}
OUT {"rounds": [[{"sequence": [id, ...], "logprobs": [...], "cached": n}, ...], ...], "key": str}
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from examples.serving.server import ENVIRONMENT

ROOT = Path(__file__).parents[3]


def fields(base, adapter, **more):
    """Arguments of vllm.LLM; small chunks, so that prefill of long prompts overlaps with decoding."""
    own = {"load_format": "lora_moe", "additional_config": {"lora_moe": {"adapter": str(adapter)}}}
    return {
        "model": str(base), "dtype": "float32", "max_model_len": 256, "enforce_eager": True,
        "max_num_batched_tokens": 48, "max_num_seqs": 16, "enable_chunked_prefill": True,
        "enable_prefix_caching": True, "block_size": 32,
    } | (own if adapter else {}) | more  # fmt: skip


def environment(ranks=1, **more):
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if ranks == 1 else {}
    return os.environ | ENVIRONMENT | alone | {k: str(v) for k, v in more.items()}


def run(folder, job, limit=420, **variables):
    """Runs a job and returns its OUT; RuntimeError with the process's output if it fails."""
    engine = job["engine"]
    ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    asked, answered = folder / "job.json", folder / "out.json"
    asked.write_text(json.dumps(job))
    answered.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.stack.vllm.engine", asked, answered],
        cwd=ROOT, env=environment(ranks, **variables), capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    if done.returncode or not answered.exists():
        raise RuntimeError(done.stdout[-6000:] + done.stderr[-6000:])
    return json.loads(answered.read_text()) | {"said": done.stdout + done.stderr}


def main(asked, answered):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(asked).read_text())
    llm = LLM(**job["engine"])
    told = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    # without prompt logprobs vLLM uses cached prefixes; with LoRAs it does not support them
    lora = LoRARequest("plain", 1, job["lora"]) if "lora" in job else None
    rounds = []
    for of_prompts, request in ((None, None), (None, lora)) if lora else ((0, None), (None, None)):
        how = SamplingParams(
            temperature=0, max_tokens=job["new"], logprobs=0, prompt_logprobs=of_prompts,
            detokenize=False, ignore_eos=True,
        )  # fmt: skip
        outputs = llm.generate(told, how, lora_request=request, use_tqdm=False)
        rounds.append([_read(output) for output in outputs])
    key = llm.llm_engine.vllm_config.compute_hash()
    Path(answered).write_text(json.dumps({"rounds": rounds, "key": key}))


def _read(output):
    made, ids = output.outputs[0], output.prompt_token_ids
    known = [step[i] for i, step in zip(ids, output.prompt_logprobs or []) if step]
    known += [step[i] for i, step in zip(made.token_ids, made.logprobs)]
    return {
        "sequence": [*ids, *made.token_ids],
        "logprobs": [k.logprob for k in known],  # of the last tokens, as many as available
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
