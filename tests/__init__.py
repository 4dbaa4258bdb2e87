import os

# read when huggingface_hub is imported: tests make no requests to the Hub and send no telemetry
os.environ.setdefault("HF_HUB_OFFLINE", "1")
