"""What is refused at startup, each with a clear message; the state of vLLM's model after loading."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from lora_moe import LoraMoeConfig
from lora_moe.routers import TaskRouter

from . import engine, models

vllm = pytest.importorskip(
    "vllm", reason="vLLM is not installed: make test-vllm makes an environment with it"
)


@pytest.fixture(scope="module", autouse=True)
def world():
    """A process group of one rank, which vLLM's layers require."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as state

    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does
        state.init_distributed_environment(1, 0, "tcp://127.0.0.1:29571", 0, "gloo")
        state.initialize_model_parallel(1, 1)
        yield
        state.destroy_model_parallel()
        state.destroy_distributed_environment()


def configured(base, adapter, **more):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**engine.fields(base, adapter, **more)).create_engine_config()


def loaded(config):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def adapted(base, tmp_path, *configs):
    return models.save_adapter(base, tmp_path / "adapter", configs)


def test_buffers_beside_the_base(base, every_kind):
    model = loaded(configured(base, every_kind, dtype="bfloat16"))
    layer = model.model.layers[0].self_attn.qkv_proj
    assert layer.requires_unquantized_input
    assert layer.lora_moe_2_b.shape == (16, 64) and layer.lora_moe_2_b.dtype == torch.bfloat16
    assert layer.lora_moe_0_w.dtype == torch.float32
    assert not [n for n, _ in model.named_parameters() if "lora_moe" in n]
    assert not [n for n in model.state_dict() if "lora_moe" in n]
    # q and v of layer 4 share a configuration, k has another; layer 7 has no experts on k and v
    assert model.model.layers[4].self_attn.qkv_proj.quant_method.banks.count == 3
    assert model.model.layers[7].self_attn.qkv_proj.quant_method.banks.count == 1
    assert type(model.lm_head.quant_method).__name__ == "UnquantizedEmbeddingMethod"


def test_what_vllm_asks_of_a_layers_own_method_is_answered(base, every_kind):
    layer = loaded(configured(base, every_kind)).model.layers[0].mlp.down_proj
    own = layer.quant_method.base
    assert type(own).__name__ == "UnquantizedLinearMethod"
    own.something = 3
    assert layer.quant_method.something == 3
    with pytest.raises(AttributeError):
        _ = layer.quant_method.nothing_of_that_name
    with pytest.raises(RuntimeError, match="only be attached to a loaded layer"):
        layer.quant_method.create_weights()


def test_the_key_of_the_compile_cache_changes_with_the_adapter(base, every_kind, tmp_path):
    keys = set()
    other = models.save_adapter(base, tmp_path / "other", models.KINDS, seed=2)
    for adapter in (every_kind, other, other):
        config = configured(base, adapter)
        before = config.compute_hash()
        loaded(config)
        keys.add(config.compute_hash())
        assert before not in keys
    assert len(keys) == 2


def test_names_without_vllms_private_function(base, every_kind, monkeypatch):
    from vllm.model_executor.models.utils import WeightsMapper

    expected = loaded(configured(base, every_kind))
    from lora_moe.vllm.adapter import Adapter
    from lora_moe.vllm.loader import attach

    plain = loaded(configured(base, None))
    monkeypatch.setattr(WeightsMapper, "map_name", lambda self, key: key)
    monkeypatch.delattr(WeightsMapper, "_map_name_with_shard")
    with Adapter(every_kind) as adapter:
        attach(plain, adapter, configured(base, None).model_config)
    wanted = dict(expected.named_buffers())
    found = dict(plain.named_buffers())
    assert wanted.keys() == found.keys() and any("lora_moe" in n for n in wanted)
    assert all(torch.equal(t, found[n]) for n, t in wanted.items() if "lora_moe" in n)


# --- refusals --------------------------------------------------------------------------------------


def test_no_adapter_there(base, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected lora_moe\.safetensors in it, found no directory"
    ):
        loaded(configured(base, tmp_path / "nothing"))


def test_no_adapter_said(base):
    config = configured(base, None, load_format="lora_moe")
    with pytest.raises(ValueError, match="expected the adapter with --load-format lora_moe"):
        loaded(config)


def test_an_adapter_where_the_cache_does_not_see_it(base, every_kind):
    extra = {"model_loader_extra_config": {"adapter": str(every_kind)}}
    with pytest.raises(ValueError, match="compile cache does not see it"):
        loaded(configured(base, every_kind, **extra))


def test_a_truncated_file(base, every_kind, tmp_path):
    shutil.copytree(every_kind, tmp_path / "cut")
    path = tmp_path / "cut/lora_moe.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"lora_moe\.safetensors: .*expected"):
        loaded(configured(base, tmp_path / "cut"))


def test_another_base(every_kind, tmp_path):
    """Fewer layers and another width: every mismatch is listed."""
    other = models.save_base(tmp_path / "other", num_hidden_layers=7, intermediate_size=64)
    with pytest.raises(ValueError, match="on linear layers of this base") as refused:
        loaded(configured(other, every_kind))
    said = str(refused.value)
    assert "model.layers.7.mlp.gate_proj: no such module" in said
    assert "model.layers.0.mlp.down_proj.lora_A: expected (16, 64), got (16, 96)" in said
    assert "model.layers.0.self_attn.q_proj" not in said


def test_experts_that_ask_for_tasks(base, tmp_path):
    folder = adapted(
        base, tmp_path,
        LoraMoeConfig(num_experts=2, r=2, router=TaskRouter(num_tasks=2), balance_coef=0, z_coef=0,
                      target_modules=("q_proj",)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="TaskRouter decides by the tasks of a request"):
        loaded(configured(base, folder))


def test_experts_around_what_is_no_linear_layer(base, tmp_path):
    folder = adapted(base, tmp_path, LoraMoeConfig(num_experts=2, r=2, target_modules=("lm_head",)))
    with pytest.raises(
        ValueError, match="lm_head: lm_head is a ParallelLMHead, which experts cannot"
    ):
        loaded(configured(base, folder))


def test_a_layer_that_is_cut_in_a_way_of_its_own(base, every_kind, monkeypatch):
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.models import llama

    class Other(QKVParallelLinear):
        def weight_loader(self, *args, **kwargs):
            return super().weight_loader(*args, **kwargs)

    monkeypatch.setattr(llama, "QKVParallelLinear", Other)
    with pytest.raises(
        ValueError, match=r"q_proj: .*is a Other, whose sharding over ranks is unknown"
    ):
        loaded(configured(base, every_kind))


def test_latent_attention_reads_a_weight_without_calling_its_layer(base, every_kind):
    from lora_moe.vllm import loader

    model = loaded(configured(base, None))
    modules = dict(model.named_modules()) | {"x.kv_b_proj": model.model.layers[0].mlp.down_proj}
    kind = dataclasses.make_dataclass("Model", [("use_mla", bool)])
    (said,) = loader._problem("x.kv_b_proj", "x.kv_b_proj", None, modules, {}, None, kind(True))
    assert (
        said == "x.kv_b_proj: latent attention reads the weight of x.kv_b_proj without calling it"
    )
