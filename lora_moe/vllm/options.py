"""A server's options: {"lora_moe": {"adapter": ...}} in vLLM's additional_config."""

from __future__ import annotations

from reprlib import repr as brief

from . import LOAD_FORMAT

FIELDS = {
    "adapter": "a directory, or a repository 'owner/name' on the Hub",
    "revision": "a branch, tag or commit of a repository",
    "base_load_format": "vLLM's load format for the base, 'auto' by default",
    "digest": "digest of the adapter's bytes, set by the loader",
}


def options_of(additional_config) -> dict:
    """Validated options.

    Raises:
        ValueError: if the adapter is missing, or a field is unknown.
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
