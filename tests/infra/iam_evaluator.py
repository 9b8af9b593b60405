"""Decides from the policies alone whether AWS would allow a request: the part of IAM's logic that Lorry's policies use.

An operator or an element this file does not know is an error, so that no policy passes unread. After AWS's page
"Policy evaluation logic": an explicit Deny wins; then every layer that is present (role, session) must allow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Policy = dict[str, Any]
Context = Mapping[str, Any]
_KNOWN = {"Sid", "Effect", "Action", "Resource", "Principal", "Condition"}


def is_allowed(
    action: str,
    resource: str,
    role: list[Policy],
    session: Policy | None = None,
    bucket: Policy | None = None,
    context: Context | None = None,
) -> bool:
    """Whether a principal that holds `role` (narrowed by `session`) may do `action` on `resource`.

    `bucket` is the resource's own policy, asked for its Deny statements. Raises ValueError for what is not understood.
    """
    given = {"aws:SecureTransport": "true", **(context or {})}
    layers = [role] + ([[session]] if session else [])
    everything = [p for layer in layers for p in layer] + ([bucket] if bucket else [])
    if any(_applies(s, action, resource, given) for p in everything for s in _statements(p, "Deny")):
        return False
    return all(
        any(_applies(s, action, resource, given) for p in layer for s in _statements(p, "Allow")) for layer in layers
    )


def is_trusted(trust: Policy, action: str, kind: str, principal: str, context: Context | None = None) -> bool:
    """Whether a role's trust policy lets this principal in; kind is AWS, Service or Federated."""

    def named(statement: dict[str, Any]) -> bool:
        return principal in _list(statement["Principal"].get(kind, []))

    def matches(statement: dict[str, Any]) -> bool:
        return named(statement) and action in _list(statement["Action"]) and _met(statement, context or {})

    return any(matches(s) for s in _statements(trust, "Allow")) and not any(
        matches(s) for s in _statements(trust, "Deny")
    )


def _statements(policy: Policy, effect: str) -> list[dict[str, Any]]:
    for statement in policy["Statement"]:
        if unknown := statement.keys() - _KNOWN:
            raise ValueError(f"policy element not understood: {sorted(unknown)}")
    return [s for s in policy["Statement"] if s["Effect"] == effect]


def _applies(statement: dict[str, Any], action: str, resource: str, context: Context) -> bool:
    actions = any(_like(pattern.lower(), action.lower()) for pattern in _list(statement["Action"]))
    resources = any(_like(_filled(pattern, context), resource) for pattern in _list(statement["Resource"]))
    return actions and resources and _met(statement, context)


def _met(statement: dict[str, Any], context: Context) -> bool:
    known = {key.lower(): _list(value) for key, value in context.items()}
    return all(
        _compare(operator, known.get(key.lower()), [_filled(str(w), context) for w in _list(wanted)])
        for operator, keys in statement.get("Condition", {}).items()
        for key, wanted in keys.items()
    )


def _compare(operator: str, got: list[Any] | None, wanted: list[str]) -> bool:
    """One condition. `got` is None when the request does not carry the key."""
    for_all = operator.startswith("ForAllValues:")
    name = operator.removeprefix("ForAllValues:")
    if_exists = name.endswith("IfExists")
    test = {
        "StringEquals": lambda g, w: g == w,
        "StringLike": lambda g, w: _like(w, g),
        "ArnEquals": lambda g, w: _like(w, g),
        "Bool": lambda g, w: g.lower() == w.lower(),
        "NumericLessThanEquals": lambda g, w: float(g) <= float(w),
    }.get(name.removesuffix("IfExists"))
    if test is None:
        raise ValueError(f"condition operator not understood: {operator}")
    if got is None:
        return for_all or if_exists
    results = [any(test(str(g), w) for w in wanted) for g in got]
    return all(results) if for_all else any(results)


def _filled(pattern: str, context: Context) -> str:
    """Policy variables; one the request does not carry matches nothing."""
    return re.sub(r"\$\{([^}]+)\}", lambda m: str(context.get(m.group(1), "\0")), pattern)


def _like(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text, re.DOTALL) is not None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
