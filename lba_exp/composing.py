"""From overrides to a checked configuration: Hydra composes, the schema decides what is valid, a mistake becomes one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lba_exp import messages, trials
from lba_exp.checks import check, check_reserved
from lba_exp.config import command_schema, run_schema
from lba_exp.config_files import check_file
from lba_exp.errors import ConfigError

CONFIG_NAME = "train"
GROUPS = ("model", "size", "data", "augmentation", "optim", "trainer", "logger", "parity", "debug", "experiments", "sweeps")
ROW_KEYS = ("origin.row", "origin.row_overrides")  # how a sweep tells a job which of its variants it is
GLOBAL_GROUPS = ("debug", "experiments", "sweeps")  # their files need `# @package _global_`


def config_roots() -> list[Path]:
    """Folders that hold experiments/ and sweeps/: the working folder first, then the ones that come with the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    own = checkout if (checkout / "pyproject.toml").is_file() and (checkout / "conf").is_dir() else package / "bundled"
    here = Path.cwd()
    return [own] if here == own else [here, own]


def conf_folder() -> Path:
    """The folder of the primary configuration."""
    return config_roots()[-1] / "conf"


def search_path_override(overrides: Iterable[str] = ()) -> str:
    """The override that adds the folders of experiments/ and sweeps/ to Hydra's search path, keeping a search path of the user's."""
    given = [o for o in parse(overrides) if o.key_or_group == "hydra.searchpath"]
    paths = [str(p) for o in given for p in (o.value() or [])] + [f"file://{root}" for root in config_roots()]
    return "hydra.searchpath=[" + ",".join(f"'{p}'" for p in dict.fromkeys(paths)) + "]"


def parse(overrides: Iterable[str]) -> list[Override]:
    """Hydra overrides as objects; raises ConfigError where the text is no override."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except OverrideParseException:
            raise ConfigError(messages.no_override(text)) from None
    return parsed


def options(group: str, further: Sequence[Path] = ()) -> dict[str, Path]:
    """The entries of a configuration group: name -> file; ``further``: the user's own search path."""
    found: dict[str, Path] = {}
    for folder in (conf_folder(), *further, *config_roots()):
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def search_folders(overrides: Iterable[Override]) -> list[Path]:
    """The folders of a ``hydra.searchpath=[file://FOLDER]`` among the overrides."""
    paths = [str(p) for o in overrides if o.key_or_group == "hydra.searchpath" for p in (o.value() or [])]
    return [Path(p.removeprefix("file://")) for p in paths if p.startswith("file://")]


def check_override(override: Override, further: Sequence[Path] = ()) -> None:
    """Raises ConfigError where an override names no key, no group or no option."""
    key = override.key_or_group.removeprefix("/")
    if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        raise ConfigError(f"{key} is not used: give folder=FOLDER for a run, or root=FOLDER for all of them.")
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return
    if not key:
        raise ConfigError(f"{override.input_line!r} names no key: write key=value.")
    if key in GROUPS and not override.is_delete():
        known = options(key, further)
        for value in values(override):
            if key == "sweeps":
                trials.check_sweep(str(value), (*further, *config_roots()))
            if value in (None, "null") and key in (*GLOBAL_GROUPS, "size"):
                continue
            if str(value) not in known:
                raise ConfigError(f"{key}={value}: {messages.unknown(str(value), known, f'an entry of {key}')}")
            if key in GLOBAL_GROUPS:
                check_file(known[str(value)], key, GROUPS, lambda group: options(group, further), command_schema())
        return
    check_reserved(key)
    messages.check_key(key, command_schema(), GROUPS)


def values(override: Override) -> list:
    """The values that an override lists, each as text; one value as it is."""
    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list(override.sweep_string_iterator())
    except HydraException:
        raise ConfigError(f"{override.input_line!r} is no list of values: write {override.key_or_group}=A,B,C.") from None


def register_schema() -> None:
    """Makes the schema known to Hydra, under the name that conf/train.yaml uses."""
    ConfigStore.instance().store(name="run_schema", node=command_schema(), provider="lba_exp")


def _hydra_compose(overrides: Sequence[str]) -> DictConfig:
    register_schema()
    paths = search_path_override(overrides)
    rest = [o for o in overrides if not o.lstrip("+").startswith("hydra.searchpath=")]
    theirs = GlobalHydra.instance().hydra  # a notebook, or a program of the user's own that uses Hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), job_name=CONFIG_NAME, version_base="1.3"):
            return hydra_compose(CONFIG_NAME, overrides=[*rest, paths], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = theirs


def compose_raw(overrides: Sequence[str], *, in_sweep: bool = False) -> DictConfig:
    """The composed configuration with its ``hydra`` and ``sweep`` nodes, keys checked, values not yet; errors as one sentence."""
    parsed = parse(overrides)
    for override in parsed:
        if not (in_sweep and override.key_or_group in ROW_KEYS):
            check_override(override, search_folders(parsed))
    try:
        return _hydra_compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(messages.from_hydra(error, command_schema(), GLOBAL_GROUPS)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"a configuration file is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
        raise ConfigError(f"{place} is not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def compose(overrides: Sequence[str] = (), *, in_sweep: bool = False) -> DictConfig:
    """Composes and checks the configuration of one run.

    Args:
        overrides: as on the command line: ``["model=lion_d", "optim.lr=1e-3"]``.
        in_sweep: the run is a job of a sweep, so that ``sweeps=`` is in place.
    Returns:
        The configuration, typed by ``RunSchema``; hand it to ``lba_exp.train``.
    Raises:
        ConfigError: one sentence that names what was wrong, what is valid, and the nearest match.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is the text {overrides!r}: give a list, [{overrides!r}].")
    overrides = [str(o) for o in overrides]
    for override in parse(overrides):
        if override.is_sweep_override() and not in_sweep:
            raise ConfigError(f"{override.input_line!r} lists several values: add -m (--multirun) to run them all.")
    cfg = compose_raw(overrides, in_sweep=in_sweep)
    return finalise(cfg, overrides, dict(cfg.hydra.runtime.choices), in_sweep=in_sweep)


def finalise(cfg: DictConfig, overrides: Sequence[str], choices: dict, *, in_sweep: bool = False) -> DictConfig:
    """A composed configuration checked against the schema (``+key`` included), its plugins imported, its origin filled in."""
    if choices.get("sweeps") and not in_sweep:
        name = choices["sweeps"]
        raise ConfigError(f"sweeps={name} is a set of runs: add -m (lba-train -m sweeps={name}).")
    try:
        if not in_sweep and any(cfg.sweep.values()):
            key = next(k for k, v in cfg.sweep.items() if v)
            raise ConfigError(f"sweep.{key} is for a set of runs: add -m (--multirun).")
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("hydra", "sweep")])
        plain = OmegaConf.to_container(own, resolve=True)
        names = {"experiment": "experiments", "sweep": "sweeps", "debug": "debug"}
        row = {k: plain["origin"][k] for k in ("row", "row_overrides")}
        told = [o for o in overrides if not o.lstrip("+").startswith(("hydra.", "hydra/", *ROW_KEYS))]
        plain["origin"] = {k: choices.get(group) for k, group in names.items()} | row | {"overrides": told}
        trials.adopt(plain, told)
        typed = OmegaConf.merge(OmegaConf.structured(run_schema()), plain)
        missing = sorted(k for k in OmegaConf.missing_keys(cfg) if not k.startswith("hydra."))
    except OmegaConfBaseException as error:
        raise ConfigError(messages.from_hydra(error, run_schema(), GLOBAL_GROUPS)) from None
    if missing:
        raise ConfigError(f"{missing[0]} has no value: {messages.describe(missing[0], run_schema())}")
    for key in ("resume", "init_from"):  # the run's record must mean the same from any folder
        if typed[key] not in (None, "auto", "never"):
            typed[key] = str(Path(typed[key]).expanduser().absolute())
    import_plugins(typed.plugins)
    check(typed)
    return typed


def import_plugins(names: Iterable[str]) -> None:
    """Imports the user's modules, from the working folder too, so that they register their parts."""
    for name in names:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            import_module(name)
        except Exception as error:  # whatever a module of the user's raises
            raise ConfigError(
                f"plugins: {name!r} cannot be imported ({error}); give modules that Python finds from the working folder."
            ) from None
