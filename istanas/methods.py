"""The registry of search methods. A method has a class for its settings and a class for its search.

This module does not import torch, because the command line must start quickly. The classes of the built-in methods are
therefore given as "module:Class", and imported when they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from istanas.errors import ConfigError
from istanas.registry import Registry
from istanas.settings import SearchSettings

if TYPE_CHECKING:
    from istanas.search.base import Search


@dataclass(frozen=True)
class SearchMethod:
    """A search method.

    Args:
        name: Its name, the value of `method` in a configuration.
        summary: What it does, in one sentence for the user.
        settings: The class of its settings, a dataclass that derives from `istanas.settings.SearchSettings`, or
            "module:Class".
        search: The class of its search, which derives from `istanas.search.Search`, or "module:Class".

    Example:
        >>> METHODS["two_stage"].settings_class().epochs
        50
    """

    name: str
    summary: str
    settings: type[SearchSettings] | str
    search: type[Search[Any]] | str

    @property
    def settings_class(self) -> type[SearchSettings]:
        """The class of the settings."""
        found: type[SearchSettings] = _imported(self.settings)
        return found

    @property
    def search_class(self) -> type[Search[Any]]:
        """The class of the search."""
        found: type[Search[Any]] = _imported(self.search)
        return found


def _imported(named: Any) -> Any:
    """Return a class, or the class that "module:Class" names."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)


METHODS: Registry[SearchMethod] = Registry("search method", "method")
"""The search methods by name."""

DEFAULT_METHOD = "two_stage"


def register_method(method: SearchMethod) -> None:
    """Make a search method available as `method: NAME`.

    Raises:
        ConfigError: If the name is taken or invalid.
    """
    METHODS.register(method.name, method)


_DEFINED = ("train_epoch", "train_step", "finish_epoch", "is_done", "begin")  # by every search class


def check_method(method: SearchMethod) -> None:
    """Check that the classes of a method are what they have to be.

    Args:
        method: The method. Its search class imports torch.

    Raises:
        ConfigError: If the settings are no dataclass of their own, or the search has another name or lacks a function.

    Example:
        >>> check_method(METHODS["gdas"])
    """
    from istanas.search.base import Search

    field, settings, search = f"method {method.name}", method.settings_class, method.search_class
    if not (isinstance(settings, type) and issubclass(settings, SearchSettings)):
        raise ConfigError(
            f"{settings!r:.80} does not derive from SearchSettings", field=field, remedy="derive it from that"
        )
    if "__dataclass_params__" not in vars(settings):
        raise ConfigError(
            f"{settings.__name__} is no dataclass", field=field, remedy="add @dataclass(frozen=True) above it"
        )
    if not (isinstance(search, type) and issubclass(search, Search)):
        raise ConfigError(
            f"{search!r:.80} does not derive from Search", field=field, remedy="derive it from that"
        )
    for kind, base, names in ((settings, SearchSettings, ("max_epochs",)), (search, Search, _DEFINED)):
        if missing := [name for name in names if getattr(kind, name) is getattr(base, name)]:
            raise ConfigError(
                f"{kind.__name__} lacks {', '.join(missing)}", field=field, remedy="define what is missing"
            )
    if getattr(search, "kind", None) != method.name:
        raise ConfigError(
            f"{search.__name__}.kind is {getattr(search, 'kind', None)!r:.80}",
            field=field,
            remedy=f"set it to {method.name!r}",
        )


def has_alpha_half(name: str | None) -> bool:
    """Return whether a method trains its alphas on a part of the pictures; True for one that is not registered.

    Example:
        >>> has_alpha_half("two_stage"), has_alpha_half("one_stage")
        (True, False)
    """
    return name is None or name not in METHODS or hasattr(METHODS[name].settings_class, "alpha_fraction")


def trains_target(name: str | None) -> bool:
    """Return whether a method also trains the network that it finds; False for a method that is not registered.

    Args:
        name: The method of a run. It is not registered if it comes from a plugin that is not loaded now.

    Example:
        >>> trains_target("one_stage"), trains_target("two_stage"), trains_target("unknown")
        (True, False, False)
    """
    return name is not None and name in METHODS and METHODS[name].settings_class.trains_target


def validates(name: str | None) -> bool:
    """Return whether a method measures the validation accuracy of its result; True for one that is not registered.

    Example:
        >>> validates("two_stage"), validates("measured")
        (True, False)
    """
    return name is None or name not in METHODS or METHODS[name].settings_class.validates


for _method in (
    SearchMethod(
        "two_stage",
        "searches a cell by sparse coding, and its network is retrained from scratch",
        settings="istanas.settings:TwoStageSettings",
        search="istanas.search.two_stage:TwoStageSearch",
    ),
    SearchMethod(
        "one_stage",
        "searches by sparse coding and trains the network in one run",
        settings="istanas.settings:OneStageSettings",
        search="istanas.search.one_stage:OneStageSearch",
    ),
    SearchMethod(
        "darts",
        "mixes all operations, weighted by a softmax",
        settings="istanas.settings:DartsSettings",
        search="istanas.search.darts:DartsSearch",
    ),
    SearchMethod(
        "pc_darts",
        "mixes all operations on a part of the channels, and weights the edges, too",
        settings="istanas.settings:PcDartsSettings",
        search="istanas.search.pc_darts:PcDartsSearch",
    ),
    SearchMethod(
        "gdas",
        "samples one operation on each edge by Gumbel-softmax in every step",
        settings="istanas.settings:GdasSettings",
        search="istanas.search.gdas:GdasSearch",
    ),
    SearchMethod(
        "random_nas",
        "trains random architectures with shared weights, and chooses the best of many",
        settings="istanas.settings:RandomNasSettings",
        search="istanas.search.random_nas:RandomNasSearch",
    ),
    SearchMethod(
        "measured",
        "trains architectures for a few epochs each, and estimates the effects of their candidates",
        settings="istanas.settings:MeasuredSettings",
        search="istanas.search.measured:MeasuredSearch",
    ),
    SearchMethod(
        "random",
        "draws a random architecture without a search",
        settings="istanas.settings:RandomSettings",
        search="istanas.search.random_search:RandomSearch",
    ),
):
    register_method(_method)
