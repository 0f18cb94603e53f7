"""Packing: a critic that judges several samples together, so that it sees a lack of variety.

Source: Lin, Khetan, Fanti, Oh, "PacGAN: the power of two samples in generative adversarial networks", NeurIPS 2018, section 2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gankern import checks


class Packed(nn.Module):
    """A critic of packs: `pack` consecutive samples, joined along their channels, are one input of the critic inside.

        critic = Packed(DCGANDiscriminator((2 * 3, 32, 32)), pack=2)      # for images [B, 3, 32, 32]
        gankern.gradient_penalty(critic.layers, critic.inputs(real), critic.inputs(fake))

    The second line is its gradient penalty: one norm and one interpolation a pack, as a pack is what the critic inside takes.

    Args:
        critic: takes [B / pack, pack * C, ...], or [B / pack, pack * F]; built for that shape.
        pack: samples judged together, >= 1.

    Shape: [B, C, ...] or [B, F], B a multiple of pack -> what the critic gives for B / pack inputs, such as logits [B / pack].

    Raises:
        ValueError, TypeError: pack is no int >= 1; x is no tensor, has fewer than two dimensions or no multiple of pack samples.
    """

    def __init__(self, critic: nn.Module, pack: int) -> None:
        super().__init__()
        checks.integer("Packed", "pack", pack, 1)
        self.critic = critic
        self.pack = pack

    @property
    def layers(self) -> nn.Module:
        """What judges `inputs(x)`: the `layers` of the critic inside, of which `gankern.mlp_critic` may know more, or itself."""
        return getattr(self.critic, "layers", self.critic)

    def inputs(self, x: Tensor) -> Any:
        """What `layers` takes: the packs, as the critic inside hands them to its own layers if it has these."""
        packs = join("Packed", x, self.pack)
        return self.critic.inputs(packs) if hasattr(self.critic, "inputs") else packs  # type: ignore[operator]

    def forward(self, x: Tensor) -> Any:
        return self.critic(join("Packed", x, self.pack))


def join(op: str, x: Tensor, pack: int) -> Tensor:
    """[B, C, ...] -> [B / pack, pack * C, ...]: consecutive samples joined along their first dimension."""
    checks.tensor(op, "x", x)
    if x.dim() < 2:
        checks.fail(ValueError, op, "x", "have two dimensions or more", f"shape {list(x.shape)}")
    if len(x) % pack:
        checks.fail(ValueError, op, "x", f"have a multiple of {pack} samples", len(x))
    return x.reshape(len(x) // pack, pack * x.shape[1], *x.shape[2:])
