"""The policy file: YAML to a checked `Policy`, or every problem at once, each with its line. And how patterns match."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Annotated, Any, Generic, Protocol, TypeVar
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from extproc.errors import PolicyInvalid
from extproc.limits import (
    MAX_BUDGETS_PER_REQUEST,
    MAX_MODEL_NAME_CHARS,
    MAX_NANOUSD,
    MAX_POLICY_BYTES,
    MAX_POLICY_DEPTH,
    MAX_POLICY_NODES,
    MAX_TOKENS,
    MAX_USER_CHARS,
)
from extproc.providers import PROVIDERS
from extproc.records import BudgetRule, IdentityRules, Mode, ModelRule, Policy, PriceRule, Scope, Target, Unit, Window

ANY = "*"
NANOUSD_PER_USD = 10**9

_VERSION_CHARS = 12


# Patterns -------------------------------------------------------------------------------------------------------------


class _Rule(Protocol):
    @property
    def pattern(self) -> str: ...


R = TypeVar("R", bound=_Rule)
T = TypeVar("T")


class Same(Generic[T]):
    """A part of a policy as a cache's key: it is one object until a reload, and to hash it whole is slow."""

    __slots__ = ("part",)

    def __init__(self, part: T) -> None:
        self.part = part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.part is other.part

    def __hash__(self) -> int:
        return id(self.part)


def most_specific(rules: Iterable[R], *names: str) -> R | None:
    """The rule for a thing of these names: one named exactly so before a pattern, then the longest, then the first."""
    matching = (rule for rule in rules if rule.pattern in names or any(fnmatchcase(n, rule.pattern) for n in names))
    return max(matching, key=lambda rule: (rule.pattern in names, len(rule.pattern)), default=None)


# What the file may say ------------------------------------------------------------------------------------------------


def _usd(value: object) -> int:
    """USD, as written, to nano-USD. Exact: no amount passes through a float."""
    if type(value) is not int and not isinstance(value, Decimal):
        raise PydanticCustomError("usd", "must be an amount in USD, such as 5 or 0.25")
    nanousd = Decimal(value) * NANOUSD_PER_USD
    if nanousd != nanousd.to_integral_value():
        raise PydanticCustomError("usd", "is finer than a nano-USD: at most 9 decimals")
    return int(nanousd)


def _target(text: str) -> str:
    provider, _, model = text.partition("/")
    if provider not in PROVIDERS or not model:
        message = "must be provider/model, with one of the providers {known}"
        raise PydanticCustomError("target", message, {"known": ", ".join(PROVIDERS)})
    if ANY in model and model != ANY:
        raise PydanticCustomError("target", "must name one model, or * for the requested one")
    return text


def _time_zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):  # what it raises for a name that is unknown, unsafe, or a directory's
        raise PydanticCustomError("time_zone", "must be a time zone's IANA name, such as Europe/Prague") from None
    return text


_Text = Annotated[str, Field(min_length=1, max_length=MAX_USER_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")]
_ModelName = Annotated[_Text, Field(max_length=MAX_MODEL_NAME_CHARS)]
_Tokens = Annotated[int, Field(gt=0, le=MAX_TOKENS)]
_Limit = Annotated[int, BeforeValidator(_usd), Field(gt=0, le=MAX_NANOUSD)]
_Rate = Annotated[int, BeforeValidator(_usd), Field(ge=0, le=MAX_NANOUSD)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Identity(_Section):
    audiences: Annotated[list[_Text], Field(min_length=1)]
    issuers: Annotated[list[_Text], Field(min_length=1)]
    allow: Annotated[list[_Text], Field(min_length=1)]
    delegates: list[_Text] = []
    teams: dict[_Text, list[_Text]] = {}


class _Model(_Section):
    targets: Annotated[list[Annotated[_ModelName, AfterValidator(_target)]], Field(min_length=1)]
    max_output_tokens: _Tokens | None = None
    reasoning: StrictBool | None = None
    drop_unsupported: StrictBool = False


class _Price(_Section):
    input_usd_per_mtok: _Rate
    output_usd_per_mtok: _Rate
    cached_input_usd_per_mtok: _Rate | None = None


class _Budget(_Section):
    scope: Annotated[Scope, Field(strict=False)]
    id: _Text | None = None
    window: Annotated[Window, Field(strict=False)]
    limit_usd: _Limit | None = None
    limit_tokens: _Tokens | None = None
    mode: Annotated[Mode, Field(strict=False)] = Mode.HARD
    time_zone: Annotated[_Text, AfterValidator(_time_zone)] = "UTC"

    @model_validator(mode="after")
    def _check(self) -> _Budget:
        if (self.limit_usd is None) == (self.limit_tokens is None):
            raise PydanticCustomError("limit", "must have exactly one of limit_usd and limit_tokens")
        if self.scope is Scope.GLOBAL and self.id not in (None, ANY):
            raise PydanticCustomError("id", "must have no id: there is one global budget")
        if self.scope is not Scope.GLOBAL and self.id is None:
            message = 'must have an id: the name of a {scope}, or "*" for each its own'
            raise PydanticCustomError("id", message, {"scope": self.scope.value})
        return self

    def rule(self) -> BudgetRule:
        unit = Unit.TOKENS if self.limit_usd is None else Unit.NANOUSD
        limit = self.limit_usd or self.limit_tokens or 0
        return BudgetRule(self.scope, self.id or ANY, self.window, unit, limit, self.mode, self.time_zone)


class _Document(_Section):
    identity: _Identity
    models: Annotated[dict[_ModelName, _Model], Field(min_length=1)]
    prices: dict[_ModelName, _Price] = {}
    budgets: list[_Budget] = []


_SECTIONS: dict[str, type[_Section]] = {"identity": _Identity, "models": _Model, "prices": _Price, "budgets": _Budget}


def parse_policy(text: str) -> Policy:
    """Check a policy file's text. Raises PolicyInvalid with every problem, as `line N: path: what`, in file order."""
    encoded = text.encode(errors="surrogatepass")
    if len(encoded) > MAX_POLICY_BYTES:
        raise PolicyInvalid((f"line 1: the policy is larger than {MAX_POLICY_BYTES} bytes",))
    source = _read_yaml(text)
    policy = None
    try:
        policy = _policy(_Document.model_validate(source.value), sha256(encoded).hexdigest()[:_VERSION_CHARS])
        _check_budgets(policy.budgets, source.report)
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False):
            source.report(_path(details), _message(details))
    if source.problems or policy is None:
        raise PolicyInvalid(tuple(message for _, message in sorted(source.problems, key=lambda problem: problem[0])))
    return policy


def doubts(text: str, chains: Collection[tuple[str, ...]] | None) -> tuple[str, ...]:
    """What in a usable policy cannot be as it says, in the form of `parse_policy`, which raises for others.

    `chains` are those of envoy.yaml: the providers of each, in the order of attempts. None where they are not known.
    """
    source, policy = _read_yaml(text), parse_policy(text)
    for rule in policy.models:
        if chains is not None and (doubt := _doubt(rule, chains)) is not None:
            source.report(("models", rule.pattern), doubt)
    groups: set[tuple[Scope, Window, Unit, Mode]] = set()
    for index, budget in enumerate(policy.budgets):
        group = (budget.scope, budget.window, budget.unit, budget.mode)
        if group not in groups and len(groups) == MAX_BUDGETS_PER_REQUEST:
            message = f"is one too many: a request that is under more than {MAX_BUDGETS_PER_REQUEST} budgets is refused"
            source.report(("budgets", index), message)
            break
        groups.add(group)
    return tuple(message for _, message in sorted(source.problems))


def _doubt(rule: ModelRule, chains: Collection[tuple[str, ...]]) -> str | None:
    """What is wrong with a rule's targets, as attempts of Envoy's."""
    providers = tuple(target.provider for target in rule.targets)
    missing = [provider for provider in dict.fromkeys(providers) if (provider,) not in chains]
    if missing:
        return f"envoy.yaml has no route to {', '.join(missing)}"
    if len(set(providers)) > 1 and providers not in chains:
        return f"no chain {','.join(providers)} in envoy.yaml: only {providers[0]} would be asked"
    return None


def _check_budgets(budgets: tuple[BudgetRule, ...], report: Callable[[_Path, str], None]) -> None:
    """Two limits on the same spending would be one balance with two answers."""
    seen: dict[tuple[Scope, str, Window, Unit, Mode], int] = {}
    for index, rule in enumerate(budgets):
        first = seen.setdefault((rule.scope, rule.id, rule.window, rule.unit, rule.mode), index)
        if first != index:
            report(("budgets", index), f"limits the same as budgets[{first}]")


# The checked document, as records -------------------------------------------------------------------------------------


def _policy(document: _Document, version: str) -> Policy:
    return Policy(
        version=version,
        identity=_identity(document.identity),
        models=tuple(_model(pattern, model) for pattern, model in document.models.items()),
        prices=tuple(_price(pattern, price) for pattern, price in document.prices.items()),
        budgets=tuple(budget.rule() for budget in document.budgets),
    )


def _identity(identity: _Identity) -> IdentityRules:
    return IdentityRules(
        audiences=tuple(identity.audiences),
        issuers=tuple(identity.issuers),
        allow=tuple(identity.allow),
        delegates=tuple(identity.delegates),
        teams=tuple((team, tuple(members)) for team, members in identity.teams.items()),
    )


def _model(pattern: str, model: _Model) -> ModelRule:
    targets = tuple(Target(*target.split("/", 1)) for target in model.targets)
    return ModelRule(pattern, targets, model.max_output_tokens, model.reasoning, model.drop_unsupported)


def _price(pattern: str, price: _Price) -> PriceRule:
    return PriceRule(pattern, price.input_usd_per_mtok, price.output_usd_per_mtok, price.cached_input_usd_per_mtok)


# YAML, with lines -----------------------------------------------------------------------------------------------------

_Path = tuple[str | int, ...]

_INTEGER = re.compile(r"-?(0|[1-9][0-9_]{0,29})")
_DECIMAL = re.compile(r"-?[0-9][0-9_]{0,29}\.[0-9]{1,30}")
_TAG = "tag:yaml.org,2002:"
_TAGS = {f"{_TAG}{kind}" for kind in ("map", "seq", "str", "null", "bool", "int", "float", "timestamp")}


@dataclass(slots=True)
class _Source:
    """A YAML document as plain values, the line of every path in it, and what is wrong with it."""

    value: Any = None
    lines: dict[_Path, int] = field(default_factory=lambda: {(): 1})
    problems: list[tuple[int, str]] = field(default_factory=list)
    nodes: int = 0

    def report(self, path: _Path, message: str) -> None:
        known = path
        while known not in self.lines:
            known = known[:-1]
        line = self.lines[known]
        self.problems.append((line, f"line {line}: {_dotted(path)}{message}"))

    def convert(self, node: yaml.Node, path: _Path) -> Any:
        """The node's value. An alias counts as often as it is used, and cannot contain itself."""
        self.nodes += 1
        if self.nodes > MAX_POLICY_NODES or len(path) > MAX_POLICY_DEPTH:
            raise _too_complex(node.start_mark)
        if node.tag not in _TAGS:
            self.report(path, f"the tag {node.tag} is not allowed")
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _pairs(self, node: yaml.MappingNode, path: _Path) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                self.problems.append((line, f"line {line}: {_dotted(path)}a field's name must be plain text"))
                continue
            field_path = (*path, key.value)
            if key.value in seen:
                self.problems.append((line, f"line {line}: {_dotted(field_path)}occurs twice"))
                continue
            seen.add(key.value)
            self.lines[field_path] = line
            yield key.value, self.convert(item, field_path)

    def _item(self, node: yaml.Node, path: _Path) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self.convert(node, path)

    def _scalar(self, node: yaml.Node, path: _Path) -> Any:
        """Numbers as written: what YAML would read as octal, in base 60 or as infinity stays a text, and is refused."""
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int" and _INTEGER.fullmatch(text):
            return int(text)
        if kind == "float" and _DECIMAL.fullmatch(text):
            return Decimal(text.replace("_", ""))
        return text


def _read_yaml(text: str) -> _Source:
    source = _Source()
    try:
        _check_depth(text)
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark or error.context_mark)
        raise PolicyInvalid((f"line {line}: not valid YAML: {error.problem}",)) from None
    except (yaml.YAMLError, UnicodeError):
        raise PolicyInvalid(("line 1: not valid YAML",)) from None
    if node is None:
        raise PolicyInvalid(("line 1: the policy is empty",))
    source.value = source.convert(node, ())
    return source


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1


def _check_depth(text: str) -> None:
    """Before it is composed, which recurses in C and would take the process down."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_POLICY_DEPTH:
            raise _too_complex(event.start_mark)


def _too_complex(mark: Any) -> PolicyInvalid:
    return PolicyInvalid((f"line {_line(mark)}: the policy has too many values, or nests them too deep",))


# Problems, in words ---------------------------------------------------------------------------------------------------

_MESSAGES = {
    "missing": "is missing",
    "string_type": "must be text: put it in quotes",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must not have control characters",
    "too_short": "must not be empty",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must not be negative",
    "less_than_equal": "is above the largest amount that can be counted",
    "enum": "must be one of: {expected}",
}


def _path(details: ErrorDetails) -> _Path:
    return tuple(step for step in details["loc"] if step != "[key]")


def _message(details: ErrorDetails) -> str:
    kind, path = details["type"], _path(details)
    if kind == "extra_forbidden":
        return _unknown(path)
    if path == ("identity", "allow") and kind in ("missing", "too_short"):
        return "must not be empty: nobody could call"
    template = _MESSAGES.get(kind)
    return template.format(**details.get("ctx", {})) if template else details["msg"]


def _unknown(path: _Path) -> str:
    section = _SECTIONS.get(str(path[0]), _Document) if len(path) > 1 else _Document
    known = list(section.model_fields)
    close = get_close_matches(str(path[-1]), known, n=1)
    return f"is not a field; did you mean {close[0]}?" if close else f"is not a field: there are {', '.join(known)}"


def _dotted(path: _Path) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{text.removeprefix('.')}: " if path else ""
