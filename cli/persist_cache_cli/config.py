"""`persist-cache.toml`: what commands are given without being told; environment and flags win.

    store = "~/prompts"       # of all commands

    [serve]                   # the options of `serve`, and flags of mlx_lm.server, by their names
    model = "mlx-community/Qwen3-4B-4bit"
    unload-after = "15m"

What options there are is asked of the commands themselves, so a new one needs nothing here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import click

from persist_cache_cli.wording import as_sentence, nearest, shown

_META = "persist_cache.config"
_TABLE = "serve"
_MODELS = frozenset({"model", "adapter-path", "draft-model"})
"""What may be a folder, or a name in the hub."""


@dataclass(frozen=True, slots=True)
class Config:
    """A file of settings, or none.

    Attributes:
        path: The file; None where there is none.
        store: Folder of the store, or None.
        serve: The values of `[serve]`, by option without its dashes at the front.
        lines: The line of each, by its name; `store` has that of the whole file.
    """

    path: Path | None = None
    store: str | None = None
    serve: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Say what is wrong with a value.

        Raises:
            click.UsageError: Always.
        """
        line = self.lines.get(name)
        at = f"{self.path}, line {line}" if line else f"{self.path}"
        raise click.UsageError(as_sentence(f"{at}: {name}: {why}"))

    def place(self, name: str) -> str:
        """Where a value stands."""
        return f"{self.path}:{self.lines.get(name, 1)}"

    # ---- the values of `serve` -----------------------------------------------------------------

    def defaults(self, serve: click.Command) -> dict[str, Any]:
        """What `[serve]` says of the command's own options, as click's `default_map` has it.

        Raises:
            click.UsageError: A value is none of the option's.
        """
        found: dict[str, Any] = {}
        for option in _options(serve):
            name = _name_in(option.opts, self.serve)
            if name is None or option.name is None:
                continue
            value = self._of_option(name, option)
            try:
                option.type_cast_value(click.Context(serve), value)
            except click.BadParameter as error:
                self.refuse(name, error.message)
            found[option.name] = value
        return found

    def _of_option(self, name: str, option: click.Option) -> Any:
        value = self.serve[name]
        if option.is_flag:
            if not isinstance(value, bool):
                self.refuse(name, f"true or false is wanted, not {shown(value)}")
            return value
        if option.multiple:
            if isinstance(value, dict):
                return [f"{key}={self._text(name, one)}" for key, one in value.items()]
            return [self._text(name, one) for one in _listed(value)]
        text = self._text(name, value)
        return str(self._beside(text)) if isinstance(option.type, click.Path) else text

    def flags(self, serve: click.Command, upstream: Sequence[argparse.Action]) -> list[str]:
        """What `[serve]` says of upstream's flags, as its command line has it.

        Raises:
            click.UsageError: A key is no option of either, or a value is none of the flag's.
        """
        own = {one for option in _options(serve) for one in _names(option.opts)}
        negated = {
            one: _names(option.opts)[0]
            for option in _options(serve)
            for one in _names(option.secondary_opts)
        }
        theirs = {one: action for action in upstream for one in _names(_strings(action))}
        found: list[str] = []
        for name in self.serve:
            if name in own:
                continue
            if (positive := negated.get(name)) is not None:
                opposite = shown(not self.serve[name])
                self.refuse(name, f"there is no such setting; write {positive} = {opposite}")
            if name not in theirs:
                self.refuse(name, f"`serve` has no such option{nearest(name, {*own, *theirs})}")
            found += self._as_flags(name, theirs[name])
        return found

    def _as_flags(self, name: str, action: argparse.Action) -> list[str]:
        value = self.serve[name]
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.refuse(name, f"true or false is wanted, not {shown(value)}")
            return [f"--{name}"] if value else []
        text = json.dumps(value) if isinstance(value, dict) else self._text(name, value)
        if name in _MODELS and self.path is not None and self._beside(text).is_dir():
            text = str(self._beside(text))
        try:
            read = action.type(text) if callable(action.type) else text
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            self.refuse(name, f"{shown(value)} is no value of --{name}")
        if action.choices is not None and read not in action.choices:
            self.refuse(name, f"{shown(value)} is none of {', '.join(map(str, action.choices))}")
        return [f"--{name}={text}"]

    def _text(self, name: str, value: Any) -> str:
        """A value as it is typed on a command line."""
        if isinstance(value, list):
            return ",".join(self._text(name, one) for one in value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self.refuse(name, f"a text or a number is wanted, not {shown(value)}")
        return str(value)

    def _beside(self, text: str) -> Path:
        """A path, relative to the file's folder."""
        folder = Path() if self.path is None else self.path.parent
        return folder / Path(text).expanduser()


def read_config(path: Path) -> Config:
    """What is in a file.

    Raises:
        click.UsageError: It cannot be read or understood, or has a key that there is not.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"{path} is not UTF-8 text.") from None
    return _parsed(path, text)


def config_of(ctx: click.Context) -> Config:
    """What was read for the command that runs."""
    found: Config = ctx.meta.get(_META) or Config()
    return found


def use(ctx: click.Context, config: Config) -> None:
    """Let commands have what a file says: `serve` its options, others the secrets of the server."""
    ctx.meta[_META] = config
    ctx.default_map = None
    if not config.serve:
        return
    secrets = {
        name.replace("-", "_"): value
        for name in ("api-key", "admin-token")
        if isinstance(value := config.serve.get(name), str)
    }
    if ctx.invoked_subcommand not in (_TABLE, "service", "config"):
        ctx.default_map = {str(ctx.invoked_subcommand): secrets}
        return
    from persist_cache_cli.commands.serve import command as serve

    ctx.default_map = {_TABLE: config.defaults(serve)}


def _parsed(path: Path, text: str) -> Config:
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{path} cannot be understood: {error}.") from None
    lines = _lines(text)
    serve = values.pop(_TABLE, {})
    store = values.pop("store", None)
    whole = Config(path, lines=lines[""])
    if values:
        name = next(iter(values))
        hint = nearest(name, {"store", _TABLE})
        whole.refuse(name, f"there is no such setting{hint or '; an option goes below [serve]'}")
    if not isinstance(serve, dict):
        whole.refuse(_TABLE, f"a table is wanted, [{_TABLE}]")
    if store is not None:
        if not isinstance(store, str) or not store:
            whole.refuse("store", f"the name of a folder is wanted, not {shown(store)}")
        store = str(path.parent / Path(store).expanduser())
    dashed: dict[str, Any] = {}
    for name, value in serve.items():
        if dashed.setdefault(name.replace("_", "-"), value) is not value:
            Config(path, lines=lines[_TABLE]).refuse(name.replace("_", "-"), "it is given twice")
    at = {**lines[""], **lines[_TABLE]}
    if "store" in dashed:
        # For `serve` alone it would win over the flag and the variable of all commands.
        why = f"it is a setting of all commands; write it above [{_TABLE}]"
        Config(path, lines=lines[_TABLE]).refuse("store", why)
    return Config(path, store, dashed, at)


_HEADER = re.compile(r"\s*\[+\s*([\w\"'.-]+)\s*\]+")
_KEY = re.compile(r"\s*[\"']?([\w-]+)[\"']?\s*(?:\.|=)")


def _lines(text: str) -> dict[str, dict[str, int]]:
    """The line of each key, by its table."""
    found: dict[str, dict[str, int]] = {"": {}, _TABLE: {}}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table, _, below = header[1].partition(".")
            name = below or table
        elif key := _KEY.match(line):
            name = key[1]
        else:
            continue
        within = found.setdefault("" if header and not below else table, {})
        within.setdefault(name.replace("_", "-"), number)
    return found


def _options(serve: click.Command) -> list[click.Option]:
    return [
        one
        for one in serve.params
        if isinstance(one, click.Option) and not one.is_eager and "--help" not in one.opts
    ]


def _strings(action: argparse.Action) -> Iterable[str]:
    return () if "--help" in action.option_strings else action.option_strings


def _names(strings: Iterable[str]) -> list[str]:
    return [one[2:] for one in strings if one.startswith("--")]


def _name_in(strings: Iterable[str], values: Mapping[str, Any]) -> str | None:
    return next((name for name in _names(strings) if name in values), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
