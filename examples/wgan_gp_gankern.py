"""WGAN-GP on MNIST, with gankern (Gulrajani et al., "Improved training of Wasserstein GANs", 2017).

One step is 5 updates of the critic and 1 of the generator.
"""

import argparse

import torch
from PIL import Image
from torch import nn

import gankern
from gankern.data import Batches, load  # MNIST comes with the package

Z_DIM, CRITIC_STEPS = 100, 5


def make_generator():
    return nn.Sequential(
        nn.Linear(Z_DIM, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 1024),
        nn.LeakyReLU(0.2),
        nn.Linear(1024, 784),
        nn.Tanh(),
        nn.Unflatten(1, (1, 28, 28)),
    )


def make_critic():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1024),
        nn.LeakyReLU(0.2),
        nn.Linear(1024, 512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 1),
    )


def save_grid(images, path, columns=8):
    """Write images [N, 1, H, W] in [-1, 1] as one picture."""
    _, _, height, width = images.shape
    grid = images.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)
    Image.fromarray(((grid.cpu() + 1) * 127.5).round().byte().numpy()).save(path)


def train(steps, batch_size, seed, out):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = Batches(load("mnist"), batch_size, seed=seed, device=device)  # [B, 1, 28, 28] in [-1, 1], without end
    generator = gankern.fuse(make_generator().to(device))
    critic = gankern.fuse(make_critic().to(device))
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9))
    opt_c = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    fixed_z = torch.randn(64, Z_DIM, device=device)
    losses = []

    for step in range(1, steps + 1):
        for _ in range(CRITIC_STEPS):
            real = next(digits)
            with torch.no_grad():
                fake = generator(torch.randn(batch_size, Z_DIM, device=device))
            wasserstein = critic(real).mean() - critic(fake).mean()
            penalty = gankern.gradient_penalty(critic, real, fake, weight=10.0)
            c_loss = penalty - wasserstein
            opt_c.zero_grad()
            c_loss.backward()
            opt_c.step()

        g_loss = -critic(generator(torch.randn(batch_size, Z_DIM, device=device))).mean()
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()

        losses.append((wasserstein.item(), penalty.item(), g_loss.item()))
        if step % 50 == 0 or step == steps:
            print("step {}  wasserstein {:.4f}  penalty {:.4f}  g_loss {:.4f}".format(step, *losses[-1]))

    generator.eval()
    with torch.no_grad():
        save_grid(generator(fixed_z), out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png", help="picture of 64 samples")
    train(**vars(parser.parse_args()))
