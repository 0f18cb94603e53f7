"""A DCGAN on MNIST at 32 x 32, with gankern (Radford et al., "Unsupervised representation learning with DCGANs", 2016)."""

import argparse

import torch
from PIL import Image
from torch import nn

import gankern
from gankern.data import Batches, load  # MNIST comes with the package
from gankern.losses import GANLoss

Z_DIM = 100


def make_generator(width=32):
    return nn.Sequential(
        nn.Unflatten(1, (Z_DIM, 1, 1)),
        nn.ConvTranspose2d(Z_DIM, 4 * width, 4, bias=False),  # 4 x 4
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),  # 8 x 8
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),  # 16 x 16
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),  # 32 x 32
        nn.Tanh(),
    )


def make_discriminator(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),  # 16 x 16
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),  # 8 x 8
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),  # 4 x 4
        nn.BatchNorm2d(4 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4 * width, 1, 4),  # 1 x 1
        nn.Flatten(),
    )


def init_weights(module):
    """The paper's: N(0, 0.02) for convolutions, N(1, 0.02) for the scale of batch normalisation."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def save_grid(images, path, columns=8):
    """Write images [N, 1, H, W] in [-1, 1] as one picture."""
    _, _, height, width = images.shape
    grid = images.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)
    Image.fromarray(((grid.cpu() + 1) * 127.5).round().byte().numpy()).save(path)


def train(steps, batch_size, seed, out):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = Batches(load("mnist", size=32), batch_size, seed=seed, device=device)  # [B, 1, 32, 32] in [-1, 1], without end
    generator = gankern.fuse(make_generator().apply(init_weights).to(device))
    discriminator = gankern.fuse(make_discriminator().apply(init_weights).to(device))
    opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = GANLoss("non-saturating")
    fixed_z = torch.randn(64, Z_DIM, device=device)
    losses = []

    for step in range(1, steps + 1):
        real = next(digits)
        fake = generator(torch.randn(batch_size, Z_DIM, device=device))

        d_loss = criterion.discriminator(discriminator(real), discriminator(fake.detach()))
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()

        g_loss = criterion.generator(discriminator(fake))
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()

        losses.append((d_loss.value.item(), g_loss.value.item()))
        if step % 100 == 0 or step == steps:
            print(f"step {step}  d_loss {losses[-1][0]:.4f}  g_loss {losses[-1][1]:.4f}")

    generator.eval()
    with torch.no_grad():
        save_grid(generator(fixed_z), out)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png", help="picture of 64 samples")
    train(**vars(parser.parse_args()))
