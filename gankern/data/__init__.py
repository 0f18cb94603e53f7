"""Training samples: where they come from (`load`) and how they reach a training step (`Batches`)."""

from gankern.data.batches import Batches
from gankern.data.dataset import Dataset, Mixture, Table
from gankern.data.images import to_float
from gankern.data.sources import NAMES, load

__all__ = ["NAMES", "Batches", "Dataset", "Mixture", "Table", "load", "to_float"]
