"""Digits by Lightning, with accumulation and clipping."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main():
    L.seed_everything(0)
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, torch.tensor(data.target)), batch_size=32)
    trainer = L.Trainer(
        max_steps=8,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), loader)
    print(f"steps {trainer.global_step}")


if __name__ == "__main__":
    main()
