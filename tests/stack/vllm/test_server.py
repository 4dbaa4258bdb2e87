"""`vllm serve` on loopback, queried with the `openai` client as a user would."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lora_moe
from examples.serving.server import ENVIRONMENT, command, free_port, serving

from . import engine, models
from .test_logprobs import compare

pytest.importorskip(
    "vllm", reason="vLLM is not installed: make test-vllm makes an environment with it"
)
NEW = 10


OPTIONS = (
    "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "tiny",
)  # fmt: skip


def client_of(address):
    from openai import OpenAI

    return OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)


def test_64_requests_at_once(base, every_kind, tmp_path):
    """No request is lost, and answers equal those of single requests and of transformers."""
    asked = models.prompts(64, 40, seed=3)
    with serving(base, every_kind, tmp_path / "log", *OPTIONS) as address:
        client = client_of(address)

        def answer(prompt):
            done = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, logprobs=1,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            return done.choices[0]

        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(answer, asked))
        alone = [answer(prompt) for prompt in asked]
        stream = client.completions.create(
            model="tiny", prompt=asked[0], max_tokens=NEW, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        streamed = "".join(part.choices[0].text for part in stream if part.choices)
    assert len(together) == 64 and all(len(c.token_ids) == NEW for c in together)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert streamed == alone[0].text
    model = lora_moe.load_adapter(models.load_base(base), every_kind)
    answers = [
        {"sequence": [*ids, *choice.token_ids], "logprobs": choice.logprobs.token_logprobs}
        for ids, choice in zip(asked, together)
    ]
    compare(model, [answers])


def test_a_server_does_not_start_with_a_damaged_adapter(base, tmp_path):
    (tmp_path / "lora_moe.safetensors").write_bytes(b"\0" * 100)
    done = subprocess.run(
        command(base, tmp_path, free_port(), *OPTIONS), capture_output=True, text=True, timeout=240,
        cwd=engine.ROOT, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode and "ValueError: " in said
    assert "lora_moe.safetensors: expected a header of at most" in said
    assert "Loading weights took" not in said  # refused before the base was loaded


def plain_lora(base, folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(models.load_base(base), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_requests_with_a_plain_lora_beside_others(ranks, base, every_kind, tmp_path):
    """A request's vLLM LoRA is added to the mixture, which applies to all requests.

    Batches run one after another: on CPUs, vLLM 0.32 applies a LoRA to a whole batch, even without experts.
    """
    peft = pytest.importorskip("peft")
    lora = plain_lora(base, tmp_path / "lora")
    fields = engine.fields(
        base, every_kind, enable_lora=True, max_lora_rank=8, tensor_parallel_size=ranks
    )
    job = {"engine": fields, "prompts": models.prompts(8), "new": NEW, "lora": str(lora)}
    without, beside = engine.run(tmp_path, job)["rounds"]
    mixture = lora_moe.load_adapter(models.load_base(base), every_kind)
    compare(mixture, [without])
    both = models.load_base(base)
    both = peft.PeftModel.from_pretrained(both, lora).merge_and_unload()  # into the weights
    both = lora_moe.load_adapter(both, every_kind)
    compare(both, [beside])
    alone, _ = models.log_probabilities(mixture, beside[0]["sequence"])
    assert (torch.tensor(beside[0]["logprobs"]) - alone[-NEW:]).abs().mean() > 0.05
