"""The packages that are compared, and the pairs of our layers and theirs."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import warnings

from .measure import Found, compare

FOLDER = "build/parity"  # for packages that need other versions than those of this environment


@dataclasses.dataclass(frozen=True)
class Package:
    """A PyPI distribution.

    module   the name to import; with_<module>.py has a function for each pair
    by       its authors
    needs    what pip installs, with exact versions
    pairs    {function: (ours, theirs)}
    apart    installed without its dependencies into a separate folder
    """

    name: str
    module: str
    by: str
    license: str
    needs: tuple[str, ...]
    pairs: dict[str, tuple[str, str]]
    apart: bool = True

    @property
    def command(self) -> str:
        target = f"--no-deps --target {FOLDER}/{self.module} " if self.apart else ""
        return f"pip install {target}{' '.join(self.needs)}"

    @property
    def version(self) -> str:
        return f"{self.name} {importlib.metadata.version(self.name)}"

    def missing(self) -> str:
        """Why the package cannot be imported; empty if it can."""
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(self.module)
        except ImportError as error:
            return str(error)
        return ""

    def compare(self, pair: str) -> Found:
        return compare(
            getattr(importlib.import_module(f".with_{self.module}", __package__), pair)()
        )


ONE = "`LoraMoeConfig(num_experts=1)`"
OWN = "`LoraMoeConfig(target_parameters=...)`"
PACKAGES = (
    Package(
        name="loralib",
        module="loralib",
        by="LoRA's authors",
        license="MIT",
        needs=("loralib==0.1.2",),
        pairs={"lora": (ONE, "`Linear`")},
    ),
    Package(
        name="peft",
        module="peft",
        by="Hugging Face",
        license="Apache-2.0",
        needs=("peft==0.21.2", "transformers==5.23.0"),
        pairs={
            "lora": (ONE, "LoRA, Llama"),
            "lora_of_t5": (ONE, "LoRA, T5"),
            "mixed_batch": ("`from_peft`, `task_ids`", "two LoRAs in a batch, Llama"),
            "xlora": ("`presets.xlora`", "X-LoRA, Llama"),
            "poly": ("`presets.poly`", "Poly, Llama"),
            "mixtral": (OWN, "LoRA on Mixtral's experts"),
            "qwen3_moe": (OWN, "LoRA on Qwen3-MoE's experts"),
        },
        apart=False,
    ),
    Package(
        name="mixlora",
        module="mixlora",
        by="MixLoRA's authors",
        license="Apache-2.0",
        needs=("mixlora==0.2.3",),
        pairs={"mixlora": ("`presets.mixlora`", "MixLoRA, Llama")},
        apart=False,
    ),
    Package(
        name="moe-peft",
        module="moe_peft",
        by="MixLoRA's authors",
        license="Apache-2.0",
        needs=("moe-peft==2.0.2", "evaluate==0.4.6"),
        pairs={
            "loramoe": ("`presets.loramoe`", "`LoraMoe`"),
            "mola": ("`presets.mola`", "`MolaSparseMoe` and its loss"),
            "mixlora": ("`presets.mixlora`", "`MixtralSparseMoe` and its loss"),
            "mixlora_dynamic": ("`presets.mixlora(top_p=...)`", "`DynamicSparseMoe`"),
            "mixlora_switch": (
                "`presets.mixlora(switch=True)`",
                "`SwitchSparseMoe` and its losses",
            ),
        },
    ),
    Package(
        name="adapters",
        module="adapters",
        by="AdapterHub",
        license="Apache-2.0",
        needs=(
            "adapters==1.3.0",
            "transformers==4.57.6",
            "huggingface_hub==0.36.2",
            "tokenizers==0.22.2",
        ),
        pairs={"mtl_lora": ("`presets.mtl_lora`", "`MTLLoRA`, diagonal cores")},
    ),
    Package(
        name="eulerforge",
        module="eulerforge",
        by="a third party",
        license="Apache-2.0",
        needs=("eulerforge==0.1.0",),
        pairs={"mixture": ("`LoraMoeConfig(router_bias=True)`", "`MixtureLoRALinear`")},
    ),
)
