"""A config as the text of a config file that makes it again: what `--print_config` shows, and what a sweep's trials read."""

from ml_collections import ConfigDict

from mptrain.config import default_config, fields


def config_text(config: ConfigDict) -> str:
    """Returns a config file in which every field stands with its value, and with its default where that is another one."""
    defaults = dict(fields(default_config()))
    lines = []
    for path, value in fields(config):
        # By what is written: 1 and 1.0 and True are equal, and not the same.
        mark = "" if repr(value) == repr(defaults[path]) else f"  # default: {defaults[path]!r}"
        lines.append(f"    config.{path} = {value!r}{mark}")
    before = ["from mptrain import default_config", "", "", "def get_config():", "    config = default_config()"]
    return "\n".join([*before, *lines, "    return config", ""])
