"""The networks: `Supernet` for the search, `TargetNet` for a found genotype, and the absorption of edge weights."""

from istanas.limits import MIN_IMAGE_SIZE
from istanas.nets.absorb import absorb_into_batchnorm
from istanas.nets.networks import ArchitectureNetwork, NodeCode, NodeState, SearchNetwork, TargetNetwork
from istanas.nets.skeleton import to_channels_last
from istanas.nets.supernet import Supernet
from istanas.nets.target import TargetNet

__all__ = [
    "MIN_IMAGE_SIZE",
    "ArchitectureNetwork",
    "NodeCode",
    "NodeState",
    "SearchNetwork",
    "Supernet",
    "TargetNet",
    "TargetNetwork",
    "absorb_into_batchnorm",
    "to_channels_last",
]
