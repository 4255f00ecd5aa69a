"""YAML in and out, as Oumi reads it: `5e-7` is a number, `${…}` is text; and every value knows its line."""

import re
from typing import Any

import yaml

from configs.given import Given
from configs.secrets import without_secrets

LARGEST = 100_000  # values in one file: anchors can make a small text expand without end
MAPPING, SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF))$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")


def parse(text: str, name: str) -> Given:
    """The value of one YAML document, each part with its place `name:line`. ValueError, with it, if it is none."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Given(None, name) if node is None else _Reader(loader, name).read(node, (), node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{name}:{line}: no valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{name}:{line}: no valid YAML: the character #x{error.character:04x} is not allowed"
        ) from None
    except RecursionError:
        raise ValueError(f"{name}: no valid YAML: nested too deeply") from None


def written(value: Any) -> str:
    """A value on one line of YAML, without credentials, to be read by people."""
    return write(without_secrets(value), flow=True)


def write(value: Any, *, flow: bool = False) -> str:
    """Plain values as YAML which `parse` reads back to the same; with `flow`, on one line."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=2**31 if flow else 120,
        default_flow_style=flow,
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the words that mean a number of YAML 1.2, and no dates."""


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it quotes what any YAML takes for a number, and repeats a value instead of pointing at it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Reader:
    """Walks the nodes of one document."""

    def __init__(self, loader: _Loader, name: str):
        self.loader, self.name, self.count = loader, name, 0

    def read(self, node: yaml.Node, above: tuple[yaml.Node, ...], key: yaml.Node) -> Given:
        """The value of a node, at the line of its key; `above` are the nodes it stands in."""
        place = f"{self.name}:{key.start_mark.line + 1}"
        self.count += 1
        if self.count > LARGEST:
            raise ValueError(f"{place}: no valid configuration: it expands to more than {LARGEST} values")
        if node in above:
            raise ValueError(f"{place}: no valid configuration: the anchor contains itself")
        if isinstance(node, yaml.ScalarNode):
            return Given(self._scalar(node, place), place, node.value)
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE:
            return Given([self.read(item, (*above, node), item) for item in node.value], place)
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
            return Given(self._mapping(node, above), place)
        raise ValueError(f"{place}: no valid configuration: the tag {node.tag} is not read here")

    def _scalar(self, node: yaml.ScalarNode, place: str) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # such as a whole number of five thousand digits
            raise ValueError(f"{place}: no valid YAML: {error}") from None

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Given]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{self.name}:{line}: no valid configuration: a key is one word")
            if key.value in lines:
                raise ValueError(
                    f"{self.name}:{line}: {key.value}: given twice, the first time in line {lines[key.value]}"
                )
            lines[key.value] = line
        self.loader.flatten_mapping(node)  # `<<: *defaults`, whose keys may be given again
        return {key.value: self.read(value, (*above, node), key) for key, value in node.value}


def _resolvers() -> dict[str, list]:
    kept = {"tag:yaml.org,2002:" + word for word in ("bool", "merge", "null", "value")}
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag in kept]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern, firsts in (("int", INT, "-+0123456789"), ("float", FLOAT, "-+.0123456789")):
        for first in firsts:
            table.setdefault(first, []).append(("tag:yaml.org,2002:" + tag, pattern))
    return table


_Loader.yaml_implicit_resolvers = _resolvers()
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *entries]
    for first, entries in _resolvers().items()
}
