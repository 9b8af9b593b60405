"""The evaluator says no where AWS says no: cases from AWS's own rules, each beside one that is allowed."""

from __future__ import annotations

import pytest

from tests.infra.iam_evaluator import is_allowed, is_trusted


def policy(effect="Allow", action="s3:GetObject", resource="arn:aws:s3:::b/*", **more):
    return {"Version": "2012-10-17", "Statement": [{"Effect": effect, "Action": action, "Resource": resource, **more}]}


@pytest.mark.parametrize(
    ("action", "resource", "context", "expected"),
    [
        ("s3:GetObject", "arn:aws:s3:::b/k", {}, True),
        ("s3:getobject", "arn:aws:s3:::b/k", {}, True),
        ("s3:PutObject", "arn:aws:s3:::b/k", {}, False),
        ("s3:GetObject", "arn:aws:s3:::bb/k", {}, False),
        ("s3:GetObject", "arn:aws:s3:::b", {}, False),
    ],
)
def test_actions_and_resources_are_globs(action, resource, context, expected):
    assert is_allowed(action, resource, [policy()], context=context) is expected


def test_an_explicit_deny_wins_wherever_it_stands():
    deny = policy("Deny", "s3:*")
    assert is_allowed("s3:GetObject", "arn:aws:s3:::b/k", [policy()])
    assert not is_allowed("s3:GetObject", "arn:aws:s3:::b/k", [policy(), deny])
    assert not is_allowed("s3:GetObject", "arn:aws:s3:::b/k", [policy()], bucket=deny)


def test_a_session_only_narrows():
    narrow, wide = policy(resource="arn:aws:s3:::b/1/*"), policy(action="*", resource="*")
    assert is_allowed("s3:GetObject", "arn:aws:s3:::b/1/k", [policy()], narrow)
    assert not is_allowed("s3:GetObject", "arn:aws:s3:::b/2/k", [policy()], narrow)
    assert not is_allowed("s3:PutObject", "arn:aws:s3:::b/1/k", [policy()], wide)


@pytest.mark.parametrize(
    ("condition", "context", "expected"),
    [
        ({"StringEquals": {"k": ["a", "b"]}}, {"k": "b"}, True),
        ({"StringEquals": {"k": "a"}}, {"k": "A"}, False),
        ({"StringEquals": {"k": "a"}}, {}, False),
        ({"StringEqualsIfExists": {"k": "a"}}, {}, True),
        ({"StringEqualsIfExists": {"k": "a"}}, {"k": "b"}, False),
        ({"StringLike": {"k": "a/*"}}, {"k": "a/b"}, True),
        ({"StringLike": {"k": "a/*"}}, {"k": "b/a"}, False),
        ({"ForAllValues:StringEquals": {"k": ["a", "b"]}}, {"k": ["a", "b"]}, True),
        ({"ForAllValues:StringEquals": {"k": ["a"]}}, {"k": ["a", "b"]}, False),
        ({"NumericLessThanEquals": {"k": "10"}}, {"k": 10}, True),
        ({"NumericLessThanEquals": {"k": "10"}}, {"k": 11}, False),
        ({"Bool": {"aws:SecureTransport": "false"}}, {}, False),
        ({"StringEquals": {"k": "a"}, "Bool": {"j": "true"}}, {"k": "a", "j": "false"}, False),
    ],
)
def test_conditions(condition, context, expected):
    assert is_allowed("s3:GetObject", "arn:aws:s3:::b/k", [policy(Condition=condition)], context=context) is expected


def test_a_policy_variable_is_filled_from_the_request_and_matches_nothing_without_it():
    own = policy(resource="arn:aws:s3:::b/${aws:userid}/*")
    assert is_allowed("s3:GetObject", "arn:aws:s3:::b/me/k", [own], context={"aws:userid": "me"})
    assert not is_allowed("s3:GetObject", "arn:aws:s3:::b/you/k", [own], context={"aws:userid": "me"})
    assert not is_allowed("s3:GetObject", "arn:aws:s3:::b//k", [own])


def test_trust_needs_principal_action_and_condition():
    statement = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"AWS": ["arn:a"]}}
    trust = {"Statement": [statement | {"Condition": {"StringEquals": {"k": "v"}}}]}
    assert is_trusted(trust, "sts:AssumeRole", "AWS", "arn:a", {"k": "v"})
    assert not is_trusted(trust, "sts:AssumeRole", "AWS", "arn:b", {"k": "v"})
    assert not is_trusted(trust, "sts:AssumeRole", "AWS", "arn:a")
    assert not is_trusted(trust, "sts:TagSession", "AWS", "arn:a", {"k": "v"})


@pytest.mark.parametrize(
    "strange", [{"NotAction": "s3:*"}, {"Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}}]
)
def test_what_is_not_understood_is_an_error(strange):
    with pytest.raises(ValueError, match="not understood"):
        is_allowed("s3:GetObject", "arn:aws:s3:::b/k", [policy(**strange)])
