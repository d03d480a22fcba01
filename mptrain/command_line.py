"""What is wrong with the flags of a command line, all of it at once: absl and ml_collections stop at the first mistake."""

import ast
import dataclasses
import difflib
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

from mptrain import config as config_lib

_CONFIG = "config."
_OPTIONS = "optimizer.options."


@dataclasses.dataclass
class CommandLine:
    """A command line whose flags were looked at one by one.

    Attributes:
        argv: what absl is to parse.
        options: config path -> value, of the optimizer's options: the config file need not name them first.
        faults: a line for each flag that was left out of `argv` because it is wrong.
    """

    argv: list[str]
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)


def read(argv: list[str]) -> CommandLine:
    """Looks at every flag of `argv`; those of `config.model`, which only the config file knows, are left to absl."""
    line = CommandLine(argv[:1])
    for tokens in _flags(argv[1:]):
        name, value = tokens[0].lstrip("-").split("=", 1) if "=" in tokens[0] else (tokens[0].lstrip("-"), None)
        value = tokens[1] if len(tokens) > 1 else value
        if not tokens[0].startswith("-"):
            line.argv += tokens
        elif name.startswith(_CONFIG + _OPTIONS) and value is not None:
            line.options[name.removeprefix(_CONFIG)] = _literal(value)
        elif fault := _fault(name, value):
            line.faults.append(fault)
        else:
            line.argv += tokens
    return line


def given(argv: list[str]) -> dict[str, str]:
    """Returns {flag: value} of the command line, be the two joined by "=" or by a space."""
    pairs = (("=".join(tokens)).lstrip("-").partition("=") for tokens in _flags(argv[1:]) if tokens[0].startswith("-"))
    return {name: value for name, equals, value in pairs if equals}


def _flags(arguments: list[str]) -> Iterator[list[str]]:
    """Yields each flag with its value, if that follows after a space, and each argument that belongs to no flag."""
    left = list(arguments)
    while left:
        token = left.pop(0)
        takes = token.startswith("-") and "=" not in token and not _is_boolean(token.lstrip("-"))
        yield [token, left.pop(0)] if takes and left and not left[0].startswith("-") else [token]


def _is_boolean(name: str) -> bool:
    """Whether a flag takes no value after a space; `--nofield` is one too."""
    if name.startswith(_CONFIG):
        return isinstance(dict(config_lib.fields(config_lib.default_config())).get(name.removeprefix(_CONFIG)), bool)
    return _absl_name(name) is not None and flags.FLAGS[_absl_name(name)].boolean


def _absl_name(name: str) -> str | None:
    return next((each for each in (name, name.removeprefix("no")) if each in flags.FLAGS), None)


def _fault(name: str, value: str | None) -> str | None:
    if name.startswith((_CONFIG, f"no{_CONFIG}")):
        return _field_fault(name.removeprefix("no").removeprefix(_CONFIG), value)
    known = _absl_name(name)
    if known is None:
        close = difflib.get_close_matches(name, list(flags.FLAGS), 1, 0.6)
        return f"unknown flag --{name}" + (f": did you mean --{close[0]}?" if close else ": --helpfull lists all flags")
    if known == "config" or value is None:
        return None
    try:
        flags.FLAGS[known].parser.parse(value)
    except (TypeError, ValueError) as error:
        return f"--{name}={value}: {error}"
    return None


def _field_fault(field: str, value: str | None) -> str | None:
    """Returns what is wrong with `--config.FIELD=VALUE`, by the parser that ml_collections has for the field's type."""
    defaults = config_lib.default_config()
    known = dict(config_lib.fields(defaults))
    if any(field.startswith(f"{group}.") for group in config_lib.FREE_GROUPS):
        return None
    if field not in known or field in config_lib.FREE_GROUPS:
        inside = [name for name in known if name.startswith(f"{field}.")]
        if inside or field in config_lib.FREE_GROUPS:
            return f"--config.{field} is a group of fields: set one of them, as --config.{field}.FIELD=VALUE"
        return config_lib.unknown_field(field)
    flag = f"--config.{field}" if value is None else f"--config.{field}={value}"
    try:
        config_flags.DEFINE_config_dict("config", defaults, flag_values=(values := flags.FlagValues()), sys_argv=["", flag])
        values(["", flag])
    except (flags.Error, TypeError, ValueError):
        holder, leaf = config_lib.place(defaults, field)
        return f"{flag}: write a value of type {holder.get_type(leaf).__name__}"
    return None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
