"""Training images: where they come from (`load`) and how they reach a training step (`Batches`)."""

from gankern.data.batches import Batches
from gankern.data.images import ImageData, to_float
from gankern.data.sources import load

__all__ = ["Batches", "ImageData", "load", "to_float"]
