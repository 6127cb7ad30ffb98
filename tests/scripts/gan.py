"""Two models, two optimizers: a small generative adversarial network on a ring of points."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def main():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    one, zero = torch.ones(32, 1), torch.zeros(32, 1)
    for _ in range(5):
        angle = torch.rand(32) * 6.283
        real = torch.stack((angle.cos(), angle.sin()), 1)
        fake = generator(torch.randn(32, 4))
        of_critic.zero_grad()
        on_real = F.binary_cross_entropy_with_logits(critic(real), one)
        on_real.backward()
        on_fake = F.binary_cross_entropy_with_logits(critic(fake.detach()), zero)
        on_fake.backward()
        of_critic.step()
        of_generator.zero_grad()
        fooled = F.binary_cross_entropy_with_logits(critic(fake), one)
        fooled.backward()
        of_generator.step()
        print(f"losses {on_real.item() + on_fake.item():.7f} {fooled.item():.7f}")


if __name__ == "__main__":
    main()
