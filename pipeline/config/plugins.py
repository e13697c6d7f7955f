"""Plugins: user code that registers operations, search spaces, search methods and data sets.

A plugin is a Python file that the user names with `--plugin`, or the entry point of an installed package (group
`istanas.plugins`); no configuration file can name one. Other processes receive everything that may depend on plugins as
a `Shipped` value, which loads them before it unpickles anything.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import linecache
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

# The package's own entries are registered before any plugin is imported, so that none of them counts as a plugin's.
import istanas.data.registry  # noqa: F401
from istanas.errors import ConfigError, IstanasError
from istanas.limits import MB, read_at_most
from istanas.methods import METHODS, check_method
from istanas.registry import Registration, registering_for, unregister
from istanas.space import SPACES
from pipeline.base.text import one_line
from pipeline.config.schema import search_section, space_section
from pipeline.config.sections import settings_from

GROUP = "istanas.plugins"
OPTION = "--plugin"
SOURCE_BYTES = 1 * MB
"""Limit of a plugin's file, which travels to every worker."""


@dataclass(frozen=True)
class Plugin:
    """A plugin, in a form that other processes can load.

    Args:
        name: The name of its file, or "ENTRY POINT (PACKAGE VERSION)".
        digest: SHA-256 of its source; for a package, also of its name and version.
        source: The text of its file; "" for a package, which must be installed wherever it is used.
        path: Its file, as the user has named it; "" for a package.
        entry_point: The value of the entry point, such as "my_package.search"; "" for a file.
    """

    name: str
    digest: str
    source: str = field(repr=False)
    path: str = ""
    entry_point: str = ""

    @property
    def where(self) -> str:
        """How error messages name the plugin."""
        return f"{OPTION} {self.path}" if self.path else f"plugin {self.name}"


_active: dict[str, tuple[Plugin, list[Registration]]] = {}  # digest -> the plugin, and what it has registered
_executed: dict[str, list[Registration]] = {}  # the same for all plugins that this process has ever executed


def load_plugins(files: Sequence[str]) -> tuple[Plugin, ...]:
    """Load the plugins of installed packages and those of some files, and unload all others.

    A process executes each plugin once. Files with the same content are one plugin.

    Args:
        files: The files, as the user has named them.

    Raises:
        ConfigError: A plugin cannot be read, fails, registers nothing, or registers a name that is taken.
    """
    activate([*map(_installed_plugin, _entry_points()), *map(_file_plugin, files)])
    return active_plugins()


def active_plugins() -> tuple[Plugin, ...]:
    """Return the plugins that are loaded, in the order in which they were loaded."""
    return tuple(plugin for plugin, _ in _active.values())


def plugin_digests() -> list[str]:
    """Return the digests of the loaded plugins in a fixed order, for the hash of a run."""
    return sorted(_active)


def activate(plugins: Sequence[Plugin]) -> None:
    """Make the entries of these plugins, and of no others, registered.

    Raises:
        ConfigError: See `load_plugins`. No plugin is loaded then.
    """
    wanted = {plugin.digest: plugin for plugin in plugins}
    try:
        for digest in [digest for digest in _active if digest not in wanted]:
            _deactivate(digest)
        for plugin in wanted.values():
            if plugin.digest not in _active:
                _active[plugin.digest] = plugin, _registered_by(plugin)
    except BaseException:
        for digest in list(_active):
            _deactivate(digest)
        raise


def _deactivate(digest: str) -> None:
    _, registrations = _active.pop(digest)
    unregister(registrations)


def _registered_by(plugin: Plugin) -> list[Registration]:
    """Register the entries of a plugin, and return them. The plugin is executed if it has not been."""
    with _one_line(plugin), registering_for(plugin.name) as registered:
        if plugin.digest in _executed:
            for entry in _executed[plugin.digest]:
                entry.registry.register(entry.name, entry.entry)
        else:
            with redirect_stdout(sys.stderr):  # Programs read the results of commands from stdout.
                _execute(plugin)
            if not registered:
                raise ConfigError(
                    "registers nothing",
                    field=plugin.where,
                    remedy="call register_dataset or another register function in it",
                )
            _check(registered)
            _executed[plugin.digest] = list(registered)
    return registered


def _check(registered: Sequence[Registration]) -> None:
    """Check what a plugin has registered as far as this is possible without pictures.

    Raises:
        ConfigError: If a method or a space cannot have a section in a configuration, or is impossible by default. Code
            of the plugin may raise any other exception.
    """
    for entry in registered:
        if entry.registry is METHODS:
            check_method(entry.entry)
            section: Any = search_section(entry.name)
            settings_from(section.settings_class, section())
            section.model_json_schema()
        elif entry.registry is SPACES:
            section = space_section(entry.name)
            space = section().build()
            hash(space)  # its costs are remembered
            space.random(0)  # checks the names of kinds and candidates
            section.model_json_schema()


# ---------- files
def _file_plugin(file: str) -> Plugin:
    """Read a plugin's file.

    Raises:
        ConfigError: It is no readable text file.
    """
    path, where = Path(file).expanduser(), f"{OPTION} {file}"
    remedy = "name a Python file"
    try:
        content = read_at_most(path, SOURCE_BYTES)
        source = content.decode()
    except FileNotFoundError:
        raise ConfigError("no such file", field=where, remedy=remedy) from None
    except IsADirectoryError:
        raise ConfigError("a folder, not a file", field=where, remedy=remedy) from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({one_line(error)})", field=where, remedy=remedy) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8", field=where, remedy=remedy) from None
    except ValueError as error:
        raise ConfigError(str(error), field=where, remedy=remedy) from None
    return Plugin(path.name, hashlib.sha256(content).hexdigest(), source, path=file)


def module_name(plugin: Plugin) -> str:
    """Return the name of the module of a plugin's file: the same in every process, so that pickles refer to it."""
    return f"_istanas_plugin_{plugin.digest[:16]}"


def _execute(plugin: Plugin) -> None:
    if plugin.entry_point:
        _import(plugin)
        return
    module = ModuleType(module_name(plugin))
    module.__file__ = plugin.path
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up
    # For tracebacks, and for `inspect.getsource`, on machines that lack the file.
    linecache.cache[plugin.path] = len(plugin.source), None, plugin.source.splitlines(True), plugin.path
    try:
        exec(compile(plugin.source, plugin.path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise


@contextmanager
def _one_line(plugin: Plugin) -> Iterator[None]:
    """Convert any exception of a plugin to a ConfigError that names its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, IstanasError) and error.field == plugin.where:
            raise
        line = _line_of(error, plugin)
        where = "" if line is None else f"line {line}: "
        if isinstance(error, IstanasError):
            what = error.problem if error.field is None else f"{error.field}: {error.problem}"
            raise ConfigError(f"{where}{what}", field=plugin.where, remedy=error.remedy) from error
        what = f"SyntaxError: {error.msg}" if isinstance(error, SyntaxError) else one_line(error)
        raise ConfigError(f"{where}{what}", field=plugin.where, remedy="correct the plugin") from error


def _line_of(error: BaseException, plugin: Plugin) -> int | None:
    """Return the line of a plugin's file in which an error occurred; None if there is none."""
    if isinstance(error, SyntaxError) and error.filename == plugin.path:
        return error.lineno
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == plugin.path]
    return lines[-1] if lines else None


# ---------- installed packages
def _entry_points() -> list[importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=GROUP)
    return sorted(found, key=lambda entry: (_package_of(entry), entry.name))


def _package_of(entry: importlib.metadata.EntryPoint) -> str:
    return "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _installed_plugin(entry: importlib.metadata.EntryPoint) -> Plugin:
    """Return the plugin of an entry point.

    Raises:
        ConfigError: Its module does not exist, or the package that contains it cannot be imported.
    """
    package = _package_of(entry)
    named = Plugin(f"{entry.name} ({package})", "", "", entry_point=entry.value)
    with _one_line(named):
        spec = importlib.util.find_spec(entry.module)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {entry.module!r}")
        content = Path(spec.origin).read_bytes() if spec.origin and spec.has_location else b""
    digest = hashlib.sha256(f"{package} {entry.value}\n".encode() + content).hexdigest()
    return Plugin(named.name, digest, "", entry_point=entry.value)


def _import(plugin: Plugin) -> None:
    """Import the module of an entry point, and call its function if it names one.

    Raises:
        ConfigError: The package is not installed here, or another version of it is.
    """
    here = [_installed_plugin(entry) for entry in _entry_points() if entry.value == plugin.entry_point]
    if plugin not in here:
        found = f"{', '.join(each.name for each in here)} differs from it" if here else "it is not installed"
        raise ConfigError(
            f"{found} where this process runs", field=plugin.where, remedy="install the same version there"
        )
    (entry,) = (entry for entry in _entry_points() if _installed_plugin(entry) == plugin)
    loaded = entry.load()
    if callable(loaded):
        loaded()


# ---------- other processes
@dataclass(frozen=True)
class Shipped:
    """A value for another process, which can be read only after the plugins that it depends on are loaded.

    Args:
        plugins: The plugins.
        pickled: The value.
    """

    plugins: tuple[Plugin, ...]
    pickled: bytes = field(repr=False)

    def open(self) -> Any:
        """Load the plugins in this process, and return the value.

        Raises:
            ConfigError: A plugin cannot be loaded here.
        """
        activate(self.plugins)
        return pickle.loads(self.pickled)


def ship(value: Any) -> Shipped:
    """Return a value with the loaded plugins, in a form that other processes can read.

    Example:
        >>> ship({"epochs": 3}).open()
        {'epochs': 3}
    """
    return Shipped(active_plugins(), pickle.dumps(value))


# ---------- runs that needed a plugin
def plugin_options() -> list[str]:
    """Return the options of a command that loads the files that are loaded here.

    Example:
        >>> plugin_options()
        []
    """
    return [part for plugin in active_plugins() if plugin.path for part in (OPTION, plugin.path)]


def recorded() -> list[dict[str, str]]:
    """Return the loaded plugins as `environment.json` records them."""
    return [{"name": plugin.name, "sha256": plugin.digest} for plugin in active_plugins()]


def explain_missing(error: ConfigError, environment: Callable[[], dict[str, Any]]) -> ConfigError:
    """Return an error of a run's configuration, with a hint if the run used a plugin that is not loaded.

    Args:
        error: The error.
        environment: Returns the content of the run's `environment.json`.
    """
    try:
        plugins = environment().get("plugins", [])
    except IstanasError:  # the file is damaged, which is not what the user has to know now
        return error
    missing = [plugin["name"] for plugin in plugins if plugin["sha256"] not in _active]
    if not missing:
        return error
    return ConfigError(
        error.problem,
        field=error.field,
        source=error.source,
        remedy=f"this run used the plugin {' and '.join(missing)}: name it with {OPTION} FILE",
    )
