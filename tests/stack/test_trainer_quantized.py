"""lora_moe.hf.LoraMoeTrainer on quantized bases: 4 bits, GGUF."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers import Trainer

from lora_moe import (
    injected,
)
from lora_moe.hf import LoraMoeTrainer

from ..support.models import tiny
from ..support.trainers import arguments, four_bit


@pytest.mark.parametrize("kind", [Trainer, LoraMoeTrainer])
def test_a_4_bit_base_trains(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    from lora_moe import LoraMoeConfig, inject

    model = four_bit(tmp_path)
    args = arguments(tmp_path, max_steps=8)
    inject(model, LoraMoeConfig(**tiny.EXPERTS))
    trainer = kind(model, args, train_dataset=tiny.sequences(8))
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert logged[-1] < logged[0]
    assert all(layer.lora_A.dtype == torch.float32 for layer in injected(model).values())


def test_a_quantised_base_is_its_own_again(tmp_path):
    """Trainer refuses the base before inject and after remove, and accepts copies with experts."""
    pytest.importorskip("bitsandbytes")
    from lora_moe import LoraMoeConfig, inject, remove

    model, args = four_bit(tmp_path), arguments(tmp_path)
    own = model.hf_quantizer
    for _ in range(2):
        with pytest.raises(ValueError, match="purely quantized"):
            Trainer(model, args, train_dataset=tiny.sequences(8))
        inject(model, LoraMoeConfig(**tiny.EXPERTS))
        Trainer(copy.deepcopy(model), args, train_dataset=tiny.sequences(8))
        model.save_pretrained(tmp_path / "saved")
        assert model.hf_quantizer.quantization_config is own.quantization_config
        remove(model)
        assert model.hf_quantizer is own


@pytest.mark.parametrize("kind", [Trainer, LoraMoeTrainer])
def test_a_gguf_file_loads_and_trains(tmp_path, kind):
    pytest.importorskip("gguf")
    from lora_moe import LoraMoeConfig, inject

    from ..support.models.tiny_gguf import write_llama

    write_llama(tmp_path / "tiny.gguf", tiny.base(hidden_size=64, intermediate_size=64))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    if importlib.util.find_spec("transformers.quantizers.quantizer_gguf"):
        assert model.is_quantized  # a Trainer refuses it without experts
    inject(model, LoraMoeConfig(**tiny.EXPERTS))
    trainer = kind(model, arguments(tmp_path), train_dataset=tiny.sequences(8))
    trainer.train()
    assert all(layer.lora_B.any() for layer in injected(model).values())


def test_a_quantisation_without_gradients_is_refused(tmp_path):
    model = tiny.model()
    model.is_quantized = True
    model.hf_quantizer = type("Q", (), {"is_trainable": False, "quantization_config": None})()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(24, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantization with support for gradients"):
        LoraMoeTrainer(model, arguments(tmp_path), train_dataset=tiny.sequences(4))
