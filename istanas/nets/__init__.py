"""The two networks: `Supernet` in search, `TargetNet` for a found genotype."""

from istanas.nets.cell import MIN_IMAGE_SIZE, to_channels_last
from istanas.nets.supernet import NodeCode, Supernet
from istanas.nets.target import TargetNet

__all__ = ["MIN_IMAGE_SIZE", "NodeCode", "Supernet", "TargetNet", "to_channels_last"]
