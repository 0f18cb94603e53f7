"""The GAN of mlp_gan.py as a LightningModule, with gankern.

Needs Lightning: pip install "lightning>=2.6"
"""

import argparse

import lightning
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gankern
from gankern.data import load, to_float  # MNIST comes with the package
from gankern.losses import GANLoss

Z_DIM = 100


def make_generator():
    return nn.Sequential(
        nn.Linear(Z_DIM, 256),
        nn.BatchNorm1d(256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 512),
        nn.BatchNorm1d(512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 1024),
        nn.BatchNorm1d(1024),
        nn.LeakyReLU(0.2),
        nn.Linear(1024, 784),
        nn.Tanh(),
        nn.Unflatten(1, (1, 28, 28)),
    )


def make_discriminator():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.LeakyReLU(0.2),
        nn.Linear(512, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 1),
    )


class GAN(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # two optimisers
        self.generator = gankern.fuse(make_generator())
        self.discriminator = gankern.fuse(make_discriminator())
        self.criterion = GANLoss("non-saturating")
        self.losses = []

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (self.generator, self.discriminator)]

    def training_step(self, batch, batch_idx):
        opt_g, opt_d = self.optimizers()
        real = to_float(batch[0])  # uint8 -> [-1, 1]
        fake = self.generator(torch.randn(len(real), Z_DIM, device=self.device))

        d_loss = self.criterion.discriminator(self.discriminator(real), self.discriminator(fake.detach())).loss
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        opt_d.step()

        g_loss = self.criterion.generator(self.discriminator(fake)).loss
        opt_g.zero_grad()
        self.manual_backward(g_loss)
        opt_g.step()

        self.losses.append((d_loss.item(), g_loss.item()))
        if len(self.losses) % 100 == 0:
            print(f"step {len(self.losses)}  d_loss {self.losses[-1][0]:.4f}  g_loss {self.losses[-1][1]:.4f}")


def save_grid(images, path, columns=8):
    """Write images [N, 1, H, W] in [-1, 1] as one picture."""
    _, _, height, width = images.shape
    grid = images.view(-1, columns, height, width).transpose(1, 2).reshape(-1, columns * width)
    Image.fromarray(((grid.cpu() + 1) * 127.5).round().byte().numpy()).save(path)


def train(steps, batch_size, seed, out):
    lightning.seed_everything(seed)
    digits = DataLoader(TensorDataset(load("mnist").samples), batch_size, shuffle=True, drop_last=True)
    gan = GAN()
    trainer = lightning.Trainer(max_steps=2 * steps, logger=False, enable_checkpointing=False)  # it counts both optimisers' steps
    trainer.fit(gan, digits)
    gan.eval()
    with torch.no_grad():
        save_grid(gan.generator(torch.randn(64, Z_DIM, device=gan.device)), out)
    return gan.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png", help="picture of 64 samples")
    train(**vars(parser.parse_args()))
