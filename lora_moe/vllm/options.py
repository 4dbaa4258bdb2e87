"""A server's options: {"lora_moe": {"adapter": ...}} in vLLM's additional_config."""

from __future__ import annotations

from reprlib import repr as brief

from . import LOAD_FORMAT

FIELDS = {
    "adapter": "a directory, or a repository 'owner/name' on the Hub",
    "revision": "of a repository: a branch, tag or commit",
    "base_load_format": "vLLM's load format of the base, 'auto' by default",
    "digest": "of the adapter's bytes; the loader writes it",
}


def options_of(additional_config) -> dict:
    """Checked options.

    Raises:
        ValueError: the adapter is missing, or there is an unknown field.
    """
    found = additional_config.get(LOAD_FORMAT) if isinstance(additional_config, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("adapter"), str):
        raise ValueError(
            "additional_config: expected the adapter with --load-format lora_moe, as in"
            ' --additional-config \'{"lora_moe": {"adapter": DIR}}\', got '
            f"{brief(additional_config)}"
        )
    unknown = sorted(map(str, found.keys() - FIELDS.keys()))
    if unknown:
        raise ValueError(f"additional_config: expected {sorted(FIELDS)} in lora_moe, got {unknown}")
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(
                f"additional_config: {name}: expected {FIELDS[name]}, got {brief(value)}"
            )
    return found
