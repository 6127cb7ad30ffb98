"""A classifier of digits, as anybody would write it."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for layer in self.inner:
            x = F.relu(layer(x))
        return self.head(x)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save")
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model = Net(args.depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    step = 0
    while step < args.steps:
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step == args.steps:
                break
    print(f"loss {loss.item():.6f}")
    if args.save:
        torch.save(model.state_dict(), args.save)
    if args.fail:
        raise SystemExit(7)


if __name__ == "__main__":
    main()
