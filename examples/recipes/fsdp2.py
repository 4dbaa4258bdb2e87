import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lora_moe import LoraMoeConfig, aux_loss, inject, save_adapter

base = "HuggingFaceTB/SmolLM2-135M"
accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(base).to(accelerator.device)
inject(model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))
for block in model.model.layers:  # after inject, or the experts would not be sharded
    fully_shard(block)
fully_shard(model)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
data = torch.utils.data.DataLoader(torch.randint(3, 20, (32, 16)), batch_size=4)
optimizer, data = accelerator.prepare(optimizer, data)
for ids in data:
    task_loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(task_loss + aux_loss(model))
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {task_loss.item():.3f}")
save_adapter(model, "out/fsdp2")  # every rank must call it; rank 0 writes full tensors
accelerator.end_training()
