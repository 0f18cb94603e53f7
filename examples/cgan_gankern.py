"""A conditional GAN on MNIST, with gankern (Mirza and Osindero, "Conditional generative adversarial nets", 2014).

Each column of the picture is one digit, 0 to 9.
"""

import argparse

import torch
from PIL import Image
from torch import nn

import gankern
from gankern.data import Batches, load  # MNIST comes with the package
from gankern.losses import GANLoss

Z_DIM = 100


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.layers = nn.Sequential(
            nn.Linear(Z_DIM + 10, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, 784),
            nn.Tanh(),
        )

    def forward(self, z, labels):
        return self.layers(torch.cat([z, self.embedding(labels)], 1)).view(-1, 1, 28, 28)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.layers = nn.Sequential(
            nn.Linear(784 + 10, 1024),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(1024, 512),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(256, 1),
        )

    def forward(self, images, labels):
        return self.layers(torch.cat([images.flatten(1), self.embedding(labels)], 1))


def save_grid(images, path, columns=10):
    """Write images [N, 1, H, W] in [-1, 1] as one picture."""
    _, _, height, width = images.shape
    grid = images.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)
    Image.fromarray(((grid.cpu() + 1) * 127.5).round().byte().numpy()).save(path)


def train(steps, batch_size, seed, out):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = Batches(load("mnist"), batch_size, seed=seed, device=device)
    generator = gankern.fuse(Generator().to(device))
    discriminator = gankern.fuse(Discriminator().to(device))
    opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = GANLoss("non-saturating")
    fixed_z, fixed_labels = torch.randn(100, Z_DIM, device=device), torch.arange(100, device=device) % 10
    losses = []

    for step in range(1, steps + 1):
        real, labels = digits.with_labels()
        wanted = torch.randint(10, (batch_size,), device=device)
        fake = generator(torch.randn(batch_size, Z_DIM, device=device), wanted)

        d_loss = criterion.discriminator(discriminator(real, labels), discriminator(fake.detach(), wanted))
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()

        g_loss = criterion.generator(discriminator(fake, wanted))
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()

        losses.append((d_loss.value.item(), g_loss.value.item()))
        if step % 100 == 0 or step == steps:
            print(f"step {step}  d_loss {losses[-1][0]:.4f}  g_loss {losses[-1][1]:.4f}")

    generator.eval()
    with torch.no_grad():
        save_grid(generator(fixed_z, fixed_labels), out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png", help="picture of 100 samples")
    train(**vars(parser.parse_args()))
