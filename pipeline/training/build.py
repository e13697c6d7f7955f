"""Construction of networks and searches from a configuration and its data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from istanas.candidates import candidate_costs
from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.measure import Cost
from istanas.methods import METHODS
from istanas.nets import ArchitectureNetwork, SearchNetwork, TargetNetwork, to_channels_last
from istanas.optimizers import SGD
from istanas.registry import OWN
from istanas.search import Search
from istanas.search.limits import CandidateCosts
from istanas.search.measured import check_stages
from istanas.settings import CostUnit, MeasuredSettings, SearchSettings, SparseCodingSettings
from istanas.space import SPACES, Genotype, NetworkSize, SearchSpace
from istanas.training import Compute, derive_seed
from pipeline.base.text import one_line
from pipeline.config.schema import Config, RetrainSettings, SearchSection
from pipeline.config.sections import settings_from
from pipeline.training.latency_tables import configured_predictor

Sizes = SearchSection | RetrainSettings
"""Settings that determine the size of a network."""


def build_search(config: Config, dataset: ImageDataset, compute: Compute, ranks: Ranks) -> Search[Any]:
    """Return the search of the configuration's method, in its initial state.

    Raises:
        ConfigError: If the method and the space do not fit, the table of latencies cannot be used, or no architecture
            satisfies the method's limits.
    """
    method = METHODS[config.method].search_class
    settings = settings_of(config)
    supernet = _build_supernet(config, dataset, compute, method, settings)
    sizes = target_sizes(config)
    space, size, shape = config.space.build(), network_size(sizes, dataset), shape_of(dataset)
    latencies = configured_predictor(config, size, shape)

    def cost(genotype: Genotype) -> Cost:
        counted = network_cost(config, sizes, dataset, genotype)
        return counted if latencies is None else replace(counted, latency=latencies.predict(genotype))

    def costs_of_candidates(unit: CostUnit, total: bool) -> CandidateCosts:
        if unit != "latency":
            return candidate_costs(space, size, shape, unit, total=total)
        assert latencies is not None, "checked by the configuration"
        return latencies.costs(total=total)

    try:
        return method(
            supernet,
            settings,
            compute,
            config.seed,
            ranks,
            cost,
            costs_of_candidates,
        )
    except ConfigError as error:
        raise _in_section(error, "search") from None


def shape_of(dataset: ImageDataset) -> tuple[int, int, int]:
    """Return (C, H, W) of the pictures."""
    return dataset.channels, dataset.height, dataset.width


def target_sizes(config: Config) -> Sizes:
    """Return the settings of the network that a search is for: its own, or that of the retraining."""
    return config.search if config.trains_target else config.retrain


def _in_section(error: ConfigError, section: str) -> ConfigError:
    """Return an error of the library with the key of a configuration, which its field is without the section."""
    if error.field is not None and error.field.startswith("space"):  # has its own section
        return error
    field = section if error.field is None else f"{section}.{error.field}"
    return ConfigError(error.problem, field=field, remedy=error.remedy)


def build_target(config: Config, genotype: Genotype, dataset: ImageDataset) -> TargetNetwork:
    """Return the network of a retraining, newly initialised."""
    r = config.retrain
    torch.manual_seed(derive_seed(config.seed, "init"))
    return target_network(config, r, genotype, dataset, auxiliary=r.auxiliary_weight > 0)


def target_network(
    config: Config, sizes: Sizes, genotype: Genotype, dataset: ImageDataset, *, auxiliary: bool = False
) -> TargetNetwork:
    """Return a genotype's network under the settings of a search that trains its network, or of a retraining."""
    space = config.space.build()
    return space.target(genotype, network_size(sizes, dataset), auxiliary=auxiliary and space.has_auxiliary)


def network_size(sizes: Sizes, dataset: ImageDataset) -> NetworkSize:
    """Return the size of a network under the settings of a search or a retraining."""
    return NetworkSize(
        sizes.init_channels,
        sizes.layers,
        dataset.num_classes,
        stem=sizes.stem,
        in_channels=dataset.channels,
        op_batchnorm=sizes.op_batchnorm,
    )


def build_retraining(
    config: Config, genotype: Genotype, dataset: ImageDataset, compute: Compute
) -> tuple[TargetNetwork, SGD]:
    """Return the network of `build_target` on its device, ready for training, and its optimiser."""
    r = config.retrain
    net = build_target(config, genotype, dataset)
    net.activation_checkpointing = config.runtime.activation_checkpointing
    to_channels_last(net.to(compute.device))
    optimizer = SGD(
        net.parameters(),
        r.lr,
        momentum=r.momentum,
        weight_decay=r.weight_decay,
        nesterov=r.nesterov,
        fused=compute.device.type == "cuda",
    )
    return net, optimizer


def ema_model(net: TargetNetwork, decay: float) -> AveragedModel:
    """Return an exponential moving average of a network's weights and running statistics.

    Its `update_parameters`, called after each step, computes average = decay * average + (1 - decay) * weights. The
    first call copies the weights.

    Args:
        net: The network.
        decay: In (0, 1). The average is over about 1 / (1 - decay) steps.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def ema_network(ema: AveragedModel) -> TargetNetwork:
    """Return the network that has the averaged weights."""
    return cast(TargetNetwork, ema.module)


def network_cost(config: Config, sizes: Sizes, dataset: ImageDataset, genotype: Genotype) -> Cost:
    """Return parameters and multiply-adds of a genotype's network, see `target_network`."""
    return config.space.build().cost(genotype, network_size(sizes, dataset), shape_of(dataset))


def check_networks(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check that the search space has networks of the sizes of these jobs, and supports the method.

    Raises:
        ConfigError: If it does not.
    """
    space = config.space.build()
    # The cost of what a search finds is that of the network of its retraining.
    costed = () if config.trains_target or "search" not in jobs else ("retrain",)
    for job in dict.fromkeys((*jobs, *costed)):
        try:
            size = network_size(getattr(config, job), dataset)
            space.check_size(size)
            settings = settings_of(config)
            if job == "search" and isinstance(settings, MeasuredSettings):
                check_stages(space, size, settings)
        except ConfigError as error:
            raise _in_section(error, job) from None
        if SPACES.origin(space.name) != OWN and type(space).cost is SearchSpace.cost:
            _check_network_of_plugin(space, size, dataset)
    if "search" in jobs:
        _check_partial_channels(config, dataset)


def _check_network_of_plugin(space: SearchSpace, size: NetworkSize, dataset: ImageDataset) -> None:
    """Check that a plugin's space has a network of this size, and that all candidates of a decision fit into it.

    The network has no memory, as in `SearchSpace.cost`, which is computed in every search.

    Raises:
        ConfigError: If the network cannot be built, or does not map the pictures to logits.
    """
    pictures = (2, dataset.channels, dataset.height, dataset.width)
    everything = {
        kind: [tuple(range(d.n_candidates)) for d in each] for kind, each in space.decisions.items()
    }
    field = f"space {space.name}"
    try:
        with torch.device("meta"), torch.no_grad():
            net = space.supernet(size, lambda decision: decision.n_candidates, auxiliary=False, partial=1)
            net.install(everything, lambda kind, alphas: alphas)
            out = net(torch.zeros(pictures))
    except ConfigError:
        raise
    except Exception as error:  # of the plugin's code
        raise ConfigError(
            f"its network raises {one_line(error)} for pictures {pictures}",
            field=field,
            remedy="correct network",
        ) from error
    if not isinstance(out, torch.Tensor) or out.shape != (2, size.num_classes):
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
        raise ConfigError(
            f"its network returns {found} for pictures {pictures}",
            field=field,
            remedy=f"return logits, {(2, size.num_classes)}",
        )


def _check_partial_channels(config: Config, dataset: ImageDataset) -> None:
    """Check that the operations can run on a part of the channels, if the method requires it.

    The network is built without memory for its weights, because only its space knows the channels of its operations.
    """
    method, settings = METHODS[config.method].search_class, settings_of(config)
    partial = _partial_channels(config, method, settings)
    if partial > 1:
        try:
            with torch.device("meta"):
                config.space.build().supernet(
                    network_size(config.search, dataset),
                    lambda decision: method.alpha_size(settings, decision),
                    auxiliary=False,
                    partial=partial,
                )
        except ConfigError as error:
            raise _in_section(error, "search") from None


def check_method(config: Config) -> None:
    """Check that the search space supports the method, as far as this is known without pictures.

    Raises:
        ConfigError: If it does not.
    """
    _partial_channels(config, METHODS[config.method].search_class, settings_of(config))


def _partial_channels(config: Config, method: type[Search[Any]], settings: SearchSettings) -> int:
    partial = method.partial_channels(settings)
    if partial > 1 and not config.space.space_class.has_partial_channels:
        raise ConfigError(
            f"{config.method} runs operations on a part of the channels, which {config.space.name} does not support",
            field="method",
            remedy="choose another method or another space.name",
        )
    return partial


def _build_supernet(
    config: Config,
    dataset: ImageDataset,
    compute: Compute,
    method: type[Search[Any]],
    settings: SearchSettings,
) -> SearchNetwork:
    space = config.space.build()
    if not method.has_supernet:
        net = ArchitectureNetwork(space, network_size(config.search, dataset))
        net.activation_checkpointing = config.runtime.activation_checkpointing
        return net
    torch.manual_seed(derive_seed(config.seed, "init"))
    supernet = space.supernet(
        network_size(config.search, dataset),
        lambda decision: method.alpha_size(settings, decision),
        auxiliary=getattr(settings, "auxiliary_weight", 0) > 0 and space.has_auxiliary,
        partial=_partial_channels(config, method, settings),
    )
    supernet.activation_checkpointing = config.runtime.activation_checkpointing
    to_channels_last(supernet.to(compute.device))
    return supernet


def settings_of(config: Config) -> SearchSettings:
    """Return the settings of the search.

    Each field takes the value of the configuration's key of the same name, in `search` or `space`. The seed of the
    matrices is a property of the whole configuration. A field without a key keeps its default.
    """
    kind = config.search.settings_class
    own = {"matrix_seed": config.matrix_seed} if issubclass(kind, SparseCodingSettings) else {}
    return settings_from(kind, config.search, config.space, **own)
