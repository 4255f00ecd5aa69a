"""`einkorn launch render`: a run's configuration and a target's settings → the file that the target's tool takes."""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import load
from configs.secrets import HIDDEN, redacted, without_secrets
from configs.sources import PYTHON
from launch.targets import HERE, TARGETS, Setting, Target
from trainers.exits import RESTARTABLE

TOKENS = ("HF_TOKEN", "WANDB_API_KEY")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # what every target takes
PLAIN = re.compile(r"[^\n\x00]*")


class _Template(string.Template):
    delimiter = "@"
    pattern = r"@(?:(?P<escaped>@@)|(?P<named>(?!))|\{(?P<braced>[a-z_]+)\}|(?P<invalid>(?!)))"  # type: ignore[assignment]


def render(target: str, config: str, given: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """The text of the file for `target`. `given` are NAME=VALUE; `overrides` go to `einkorn train`, after the file.

    Raises ValueError, of one line, for what is unknown, missing or secret.
    """
    place = _target(target)
    values = _values(target, place.settings, given)
    text, output_dir = _configuration(config, overrides)
    python = PYTHON.match(config)
    suffix, argument = (".py", f":{python[2]}" if python[2] else "") if python else (".yaml", "")
    here = str(Path(python[1] if python else config).resolve())
    where = (here if place.config is None else place.config.format(**values) + suffix) + argument
    script = place.template.endswith(".sh.in")
    # Where a node is gone, SkyPilot kills the others, and these codes would mean a restart whatever it ended with.
    codes = [code for code in RESTARTABLE if target != "skypilot" or code not in (137, 143)]
    words = ["-c", where, *overrides]
    filled = {name: shlex.quote(value) if script else _yaml(value) for name, value in values.items()}
    filled["name"] = values["name"]
    bare = [name for name, setting in place.settings.items() if setting.number or setting.allowed]
    filled |= {name: values[name] for name in bare}
    filled |= {
        "kind": target,
        "suffix": suffix,
        "config": shlex.quote(here) if script else _yaml(here),
        "config_text": _yaml(text),
        "train": _quoted(words),
        "output_dir": _quoted([output_dir]),
        "args": json.dumps([f"launch/env/{values['chip']}.env", *words], ensure_ascii=False),
        "restartable": " | ".join(map(str, codes)),
        "restartable_list": str(codes),
    }
    if "setup" in values:
        filled |= {"setup": values["setup"], "setup_text": _yaml(values["setup"])}
    if {"nodes", "retries"} <= values.keys():
        filled["pod_retries"] = str(int(values["nodes"]) * int(values["retries"]))
    return _Template((HERE / "targets" / place.template).read_text(encoding="utf-8")).substitute(filled)


def run(target: str, text: str, file: Path, environment: Mapping[str, str] = os.environ) -> int:
    """Write the rendered `text` to `file` and give it to the target's tool; its exit code."""
    place = _target(target)
    command = [word.format(file=file) for word in place.command]
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not installed; {target} needs it for --run")
    if target == "skypilot":  # by name: the values go by the environment
        command[3:3] = [word for token in TOKENS if environment.get(token) for word in ("--secret", token)]
    file.write_text(text, encoding="utf-8")
    return subprocess.run(command, check=False, env=dict(environment)).returncode


def default_file(target: str, text: str) -> Path:
    """What `run` writes to where nothing else is said."""
    return Path(f"{target}.{'sh' if text.startswith('#!') else 'yaml'}")


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"--target {name}: unknown; allowed: {', '.join(TARGETS)}")
    return TARGETS[name]


def _values(target: str, settings: Mapping[str, Setting], given: Sequence[str]) -> dict[str, str]:
    values = {name: setting.default for name, setting in settings.items()}
    for words in given:
        name, equals, value = words.partition("=")
        if not equals or name not in settings:
            raise ValueError(f"--set {name}: not a setting of {target}, NAME=VALUE; allowed: {', '.join(settings)}")
        _check(name, settings[name], value)
        values[name] = value
    if missing := [name for name, value in values.items() if value is None]:
        told = ", ".join(f"{name} ({settings[name].meaning})" for name in missing)
        raise ValueError(f"--target {target} needs --set NAME=VALUE of: {told}")
    return {name: str(value) for name, value in values.items()}


def _check(name: str, setting: Setting, value: str) -> None:
    if name == "name" and not NAME.fullmatch(value):
        raise ValueError(f"--set name={value}: lower-case letters, digits and -, a letter first, at most 40")
    if setting.number and not re.fullmatch(r"[0-9]{1,6}", value):
        raise ValueError(f"--set {name}={value}: not a number")
    if setting.allowed and value not in setting.allowed:
        raise ValueError(f"--set {name}={value}: allowed: {', '.join(setting.allowed)}")
    if redacted(value) != value or _planted(value):
        raise ValueError(f"--set {name}={HIDDEN}: looks like a credential; tokens go by the environment")
    if not PLAIN.fullmatch(value) or not value:
        raise ValueError(f"--set {name}: one line, not empty")


def _configuration(config: str, overrides: Sequence[str]) -> tuple[str, str]:
    """The file's text, after it was loaded with the overrides, so that what is wrong shows here, not on the hosts; and
    the run's output_dir.
    """
    loaded = load(config, list(overrides))
    plain: Any = loaded.config.to_dict()
    python = PYTHON.match(config)
    text = Path(python[1] if python else config).read_text(encoding="utf-8")
    if bad := [word for word in (config, *overrides) if not PLAIN.fullmatch(word)]:
        raise ValueError(f"{bad[0]!r}: more than one line; put it into {config}")
    words = " ".join((config, *overrides))
    if without_secrets(plain) != plain or redacted(text + words) != text + words or _planted(text + words):
        raise ValueError(f"{config}: has a token or password, which hosts get by the environment; take it out")
    return text, loaded.config.training.output_dir


def _planted(text: str) -> bool:
    return any((token := os.environ.get(name, "")) and token in text for name in TOKENS)


def _quoted(words: Sequence[str]) -> str:
    """Words for a shell, inside single quotes too, that keep a beginning ~/ a home folder."""
    return " ".join("~/" * word.startswith("~/") + shlex.quote(word.removeprefix("~/")) for word in words)


def _yaml(value: str) -> str:
    """A string in YAML, whatever is in it."""
    return json.dumps(value, ensure_ascii=False)
