"""Digits by a loop with Accelerate, with accumulation and clipping."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


def main():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, torch.tensor(data.target)), batch_size=64)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs, target in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                print(f"grad_norm {float(norm):.6f}")
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
