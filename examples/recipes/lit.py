import lightning
import torch
from transformers import AutoModelForCausalLM

from lora_moe import LoraMoeConfig, aux_loss, inject, save_adapter
from lora_moe.monitor import RouterMonitor


class Finetune(lightning.LightningModule):
    def __init__(self, base):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base)
        inject(self.model, LoraMoeConfig(num_experts=8, r=8, top_k=2, target_modules="all-linear"))
        self.routers = RouterMonitor(self.model)

    def training_step(self, ids, index):
        loss, aux = self.model(input_ids=ids, labels=ids).loss, aux_loss(self.model)
        self.routers.update(aux)
        self.log_dict(self.routers.summary(self.global_step) | {"loss": loss})
        return loss + aux  # Lightning divides by accumulate_grad_batches

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


module = Finetune("HuggingFaceTB/SmolLM2-135M")
data = torch.utils.data.DataLoader(torch.randint(3, 20, (32, 16)), batch_size=4)
trainer = lightning.Trainer(max_steps=4, accumulate_grad_batches=2, default_root_dir="out/lit")
trainer.fit(module, data)
save_adapter(module.model, "out/lit")
