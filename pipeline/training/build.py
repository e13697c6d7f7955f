"""Construction of networks and searches from a configuration and its data set."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.measure import Cost, target_cost
from istanas.nets import Supernet, TargetNet, to_channels_last
from istanas.search import OneStageSearch, OneStageSettings, SearchSettings, TwoStageSearch, TwoStageSettings
from istanas.space import Genotype
from istanas.training import Compute, derive_seed
from pipeline.config import schema
from pipeline.config.schema import Config, OneStageConfig, RetrainSettings, TwoStageConfig

Settings = TypeVar("Settings", bound=SearchSettings)


def build_two_stage(
    config: TwoStageConfig, dataset: ImageDataset, compute: Compute, ranks: Ranks
) -> TwoStageSearch:
    """Return the search in its initial state."""
    supernet = _build_supernet(config, dataset, compute, auxiliary=False)
    settings = settings_of(config, TwoStageSettings)
    return TwoStageSearch(supernet, settings, compute, config.seed, ranks)


def build_one_stage(
    config: OneStageConfig, dataset: ImageDataset, compute: Compute, ranks: Ranks
) -> OneStageSearch:
    """Return the search in its initial state.

    Raises:
        ConfigError: If no architecture satisfies `search.max_params` and `search.max_macs`.
    """
    supernet = _build_supernet(config, dataset, compute, auxiliary=config.search.auxiliary_weight > 0)
    settings = settings_of(config, OneStageSettings)
    try:
        return OneStageSearch(
            supernet,
            settings,
            compute,
            config.seed,
            lambda genotype: network_cost(config.search, dataset, genotype),
            ranks,
        )
    except ConfigError as error:
        raise ConfigError(error.problem, field=f"search.{error.field}", remedy=error.remedy) from None


def build_target(config: Config, genotype: Genotype, dataset: ImageDataset) -> TargetNet:
    """Return the network of a retraining, newly initialised."""
    r = config.retrain
    torch.manual_seed(derive_seed(config.seed, "init"))
    return target_network(r, genotype, dataset, auxiliary=r.auxiliary_weight > 0)


def target_network(
    sizes: schema.SearchSettings | RetrainSettings,
    genotype: Genotype,
    dataset: ImageDataset,
    *,
    auxiliary: bool = False,
) -> TargetNet:
    """Return a genotype's network under the settings of a one-stage search or a retraining."""
    return TargetNet(
        genotype,
        sizes.init_channels,
        sizes.layers,
        dataset.num_classes,
        stem=sizes.stem,
        auxiliary=auxiliary,
        op_batchnorm=sizes.op_batchnorm,
        in_channels=dataset.channels,
    )


def build_retraining(
    config: Config, genotype: Genotype, dataset: ImageDataset, compute: Compute
) -> tuple[TargetNet, torch.optim.SGD]:
    """Return the network of `build_target` on its device, ready for training, and its optimiser."""
    r = config.retrain
    net = build_target(config, genotype, dataset)
    net.activation_checkpointing = config.runtime.activation_checkpointing
    to_channels_last(net.to(compute.device))
    optimizer = torch.optim.SGD(
        net.parameters(),
        r.lr,
        momentum=r.momentum,
        weight_decay=r.weight_decay,
        nesterov=r.nesterov,
        fused=compute.device.type == "cuda",
    )
    return net, optimizer


def network_cost(
    sizes: schema.SearchSettings | RetrainSettings, dataset: ImageDataset, genotype: Genotype
) -> Cost:
    """Return parameters and multiply-adds of a genotype's network, see `target_network`."""
    return target_cost(
        genotype,
        init_channels=sizes.init_channels,
        layers=sizes.layers,
        num_classes=dataset.num_classes,
        shape=(dataset.channels, dataset.height, dataset.width),
        stem=sizes.stem,
        op_batchnorm=sizes.op_batchnorm,
    )


def _build_supernet(config: Config, dataset: ImageDataset, compute: Compute, *, auxiliary: bool) -> Supernet:
    s, space = config.search, config.space
    torch.manual_seed(derive_seed(config.seed, "init"))
    supernet = Supernet(
        space.cell_space(),
        s.init_channels,
        s.layers,
        dataset.num_classes,
        n_measurements=space.n_measurements,
        stem=s.stem,
        in_channels=dataset.channels,
        op_batchnorm=s.op_batchnorm,
        auxiliary=auxiliary,
    )
    supernet.activation_checkpointing = config.runtime.activation_checkpointing
    to_channels_last(supernet.to(compute.device))
    return supernet


def settings_of(config: Config, kind: type[Settings]) -> Settings:
    """Return the settings of a search algorithm.

    Each field takes the value of the configuration's key of the same name, in `search` or `space`. The seed of the
    matrices is a property of the whole configuration. A field without a key keeps its default.
    """
    values: dict[str, Any] = {"matrix_seed": config.matrix_seed}
    for name in {field.name for field in fields(kind)} - values.keys():
        for section in (config.search, config.space):
            if name in type(section).model_fields:
                value = getattr(section, name)
                values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
