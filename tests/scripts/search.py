"""A search over seeds in the old way: gradients are cleared to zeros, and each model is left to itself."""

import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(torch.randn(12, 8)), torch.randint(4, (12,)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        print(f"{seed} {norm.item():.6f} {loss.item():.6f}")
    return weakref.ref(model)


def main():
    models = []
    for seed in range(3):
        models.append(trained(seed))
        print("alive", [model() is not None for model in models].count(True))


if __name__ == "__main__":
    main()
