"""Building networks and searches from a configuration and its data set."""

from __future__ import annotations

from typing import Any

import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.measure import Cost, target_cost
from istanas.nets import Supernet, TargetNet, to_channels_last
from istanas.search import OneStageSearch, OneStageSettings, TwoStageSearch, TwoStageSettings
from istanas.space import Genotype
from istanas.training import Compute, derive_seed
from pipeline.config.schema import Config, OneStageConfig, RetrainSettings, SearchSettings, TwoStageConfig


def build_two_stage(
    config: TwoStageConfig, dataset: ImageDataset, compute: Compute, ranks: Ranks
) -> TwoStageSearch:
    """Return the search in its initial state."""
    supernet = _build_supernet(config, dataset, compute, auxiliary=False)
    settings = TwoStageSettings(
        **_common_settings(config),
        epochs=config.search.epochs,
        termination_tol=config.search.termination_tol,
    )
    return TwoStageSearch(supernet, settings, compute, config.seed, ranks)


def build_one_stage(
    config: OneStageConfig, dataset: ImageDataset, compute: Compute, ranks: Ranks
) -> OneStageSearch:
    """Return the search in its initial state.

    Raises:
        ConfigError: If no architecture satisfies `search.max_params` and `search.max_macs`.
    """
    s = config.search
    supernet = _build_supernet(config, dataset, compute, auxiliary=s.auxiliary_weight > 0)
    settings = OneStageSettings(
        **_common_settings(config),
        max_search_epochs=s.max_search_epochs,
        train_epochs=s.train_epochs,
        schedule=s.schedule,
        warmup_epochs=s.warmup_epochs,
        drop_path=s.drop_path,
        auxiliary_weight=s.auxiliary_weight,
        label_smoothing=s.label_smoothing,
        termination_tol=s.termination_tol,
        max_params=s.max_params,
        max_macs=s.max_macs,
    )
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
        raise error.in_source("search") from None


def build_target(config: Config, genotype: Genotype, dataset: ImageDataset) -> TargetNet:
    """Return the network of a retraining, newly initialised."""
    r = config.retrain
    torch.manual_seed(derive_seed(config.seed, "init"))
    return target_network(r, genotype, dataset, auxiliary=r.auxiliary_weight > 0)


def target_network(
    sizes: SearchSettings | RetrainSettings,
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


def network_cost(sizes: SearchSettings | RetrainSettings, dataset: ImageDataset, genotype: Genotype) -> Cost:
    """Parameters and multiply-adds of a genotype's network under a one-stage search's or a retraining's settings."""
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


def _common_settings(config: Config) -> dict[str, Any]:
    """What the settings of both algorithms have."""
    s, space = config.search, config.space
    return {
        "lr": s.lr,
        "lr_min": s.lr_min,
        "momentum": s.momentum,
        "weight_decay": s.weight_decay,
        "grad_clip": s.grad_clip,
        "arch_lr": s.arch_lr,
        "arch_betas": (s.arch_betas[0], s.arch_betas[1]),
        "arch_weight_decay": s.arch_weight_decay,
        "n_measurements": space.n_measurements,
        "matrix": space.matrix,
        "matrix_seed": config.matrix_seed,
        "l1_weight": space.l1_weight,
        "solver": space.solver,
    }
