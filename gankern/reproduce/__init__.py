"""Published tables, run again: published and own numbers of each row over some seeds, and what must hold."""

from gankern.reproduce.fgan import TABLE as FGAN
from gankern.reproduce.plane import PACGAN_GRID, PACGAN_RING, PACKING, UNROLLED_RING, WGAN_GP_TOYS
from gankern.reproduce.stacked import R3GAN, STACKED_MNIST_TINY
from gankern.reproduce.table import Claim, Result, Row, Table, Trial, run

TABLES: dict[str, Table] = {
    table.name: table for table in (FGAN, PACGAN_RING, PACGAN_GRID, PACKING, UNROLLED_RING, WGAN_GP_TOYS, STACKED_MNIST_TINY, R3GAN)
}

__all__ = ["TABLES", "Claim", "Result", "Row", "Table", "Trial", "run"]
