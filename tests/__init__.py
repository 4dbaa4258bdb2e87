import os

# read when huggingface_hub is imported: no test asks a hub, or tells one that it ran
os.environ.setdefault("HF_HUB_OFFLINE", "1")
