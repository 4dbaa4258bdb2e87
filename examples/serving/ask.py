"""Starts `vllm serve`, asks it the questions of examples.serving.export, and streams the answers.

    python -m examples.serving.ask build/demo-vllm

Exits with an error if an answer differs from that of transformers.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from openai import OpenAI

from examples.serving.server import serving


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("vllm", nargs="*", help="further arguments for vllm serve, after --")
    args = parser.parse_args()
    told = json.loads((args.folder / "asked.json").read_text())
    options = ("--dtype", "float32", "--max-model-len", "512", "--served-model-name", "mixture")
    began = time.perf_counter()
    log = args.folder / "server.log"
    with serving(told["base"], told["adapter"], log, *options, *args.vllm) as address:
        print(f"the server answers after {time.perf_counter() - began:.0f} s\n")
        client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
        equal = [ask(client, question, told["new"]) for question in told["questions"]]
    print(f"\n{sum(equal)} of {len(equal)} streamed answers equal transformers' token for token")
    sys.exit(not all(equal))


def ask(client, question, new) -> bool:
    stream = client.completions.create(
        model="mixture", prompt=question["prompt"], max_tokens=new, temperature=0, stream=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    print(f"{question['task']:12} {question['prompt'].splitlines()[0][:56]!r:60}", end="")
    ids = []
    for part in stream:
        for choice in part.choices:
            print(choice.text, end="", flush=True)
            ids += choice.token_ids or []
    said = ids[: len(question["answer"])]
    equal = said == question["answer"] and len(ids) <= len(said) + 1  # + 1 for the end token
    print(
        f"  ({question['wanted']})"
        + ("" if equal else f"  transformers: {question['answer']}, not {ids}")
    )
    return equal


if __name__ == "__main__":
    main()
