"""A local AWS: moto's server with the few actions our modules need and moto 5.2.5 lacks, and with fast, clear failures.

Each patch stands for one gap; test_local_aws.py fails when moto closes a gap, so that the patch can go.
"""

from __future__ import annotations

import json
import threading
import traceback
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

from moto.budgets.responses import BudgetsResponse
from moto.core.responses import ActionResult
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.launch_templates import LaunchTemplate
from moto.ec2.models.security_groups import SecurityGroupRule
from moto.ec2.responses import EC2Response
from moto.iam.access_control import IAMPolicyStatement, PermissionResult
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

Json = dict[str, Any]
ADDED_ACTIONS: dict[type, list[str]] = {
    EC2Response: [
        "create_placement_group",
        "describe_placement_groups",
        "delete_placement_group",
        "create_capacity_reservation",
        "describe_capacity_reservations",
        "modify_capacity_reservation",
        "cancel_capacity_reservation",
    ],
    BudgetsResponse: [
        "describe_subscribers_for_notification",
        "update_budget",
        "list_tags_for_resource",
        "tag_resource",
        "untag_resource",
    ],
}
GAPS_FOUND = {cls: [name for name in names if hasattr(cls, name)] for cls, names in ADDED_ACTIONS.items()}


class Wire:
    """Whether calls to the local AWS count as TLS (they do) or, for a test, as plain HTTP."""

    plain_http = False


_kept: dict[tuple[str, str, str], dict[str, Json]] = {}


def _store(kind: str, response: Any) -> dict[str, Json]:
    return _kept.setdefault((kind, response.current_account, response.region), {})


def _tags(response: Any, kind: str) -> list[dict[str, str]]:
    return [{"Key": k, "Value": v} for k, v in response._parse_tag_specification().get(kind, {}).items()]


def create_placement_group(self: Any) -> ActionResult:
    name, groups = self._get_param("GroupName"), _store("placement", self)
    if name in groups:
        raise EC2ClientError("InvalidPlacementGroup.Duplicate", f"The placement group '{name}' already exists.")
    groups[name] = {
        "GroupName": name,
        "GroupId": "pg-" + uuid.uuid4().hex[:17],
        "GroupArn": f"arn:aws:ec2:{self.region}:{self.current_account}:placement-group/{name}",
        "State": "available",
        "Strategy": self._get_param("Strategy") or "cluster",
        "Tags": _tags(self, "placement-group"),
    }
    return ActionResult({"PlacementGroup": groups[name]})


def describe_placement_groups(self: Any) -> ActionResult:
    names, ids = self._get_param("GroupNames", []) or [], self._get_param("GroupIds", []) or []
    groups = _store("placement", self).values()
    found = [g for g in groups if (not names or g["GroupName"] in names) and (not ids or g["GroupId"] in ids)]
    if (names or ids) and not found:
        raise EC2ClientError("InvalidPlacementGroup.Unknown", f"The Placement Group '{(names or ids)[0]}' is unknown.")
    return ActionResult({"PlacementGroups": found})


def delete_placement_group(self: Any) -> ActionResult:
    if _store("placement", self).pop(self._get_param("GroupName"), None) is None:
        raise EC2ClientError("InvalidPlacementGroup.Unknown", "The Placement Group is unknown.")
    return ActionResult({})


def create_capacity_reservation(self: Any) -> ActionResult:
    param, reservation_id = self._get_param, "cr-" + uuid.uuid4().hex[:17]
    count = int(param("InstanceCount"))
    made = {
        "CapacityReservationId": reservation_id,
        "CapacityReservationArn": (
            f"arn:aws:ec2:{self.region}:{self.current_account}:capacity-reservation/{reservation_id}"
        ),
        "OwnerId": self.current_account,
        "InstanceType": param("InstanceType"),
        "InstancePlatform": param("InstancePlatform"),
        "AvailabilityZone": param("AvailabilityZone"),
        "Tenancy": param("Tenancy") or "default",
        "TotalInstanceCount": count,
        "AvailableInstanceCount": count,
        "State": "active",
        "EbsOptimized": str(param("EbsOptimized")).lower() == "true",
        "EphemeralStorage": False,
        "EndDateType": param("EndDateType") or "unlimited",
        "InstanceMatchCriteria": param("InstanceMatchCriteria") or "open",
        "Tags": _tags(self, "capacity-reservation"),
    } | ({"EndDate": param("EndDate")} if param("EndDate") else {})
    _store("reservation", self)[reservation_id] = made
    return ActionResult({"CapacityReservation": made})


def describe_capacity_reservations(self: Any) -> ActionResult:
    kept = _store("reservation", self)
    ids = self._get_param("CapacityReservationIds", []) or list(kept)
    for missing in set(ids) - set(kept):
        raise EC2ClientError("InvalidCapacityReservationId.NotFound", f"The reservation '{missing}' does not exist")
    return ActionResult({"CapacityReservations": [kept[i] for i in ids]})


def modify_capacity_reservation(self: Any) -> ActionResult:
    kept = _store("reservation", self)[self._get_param("CapacityReservationId")]
    if count := self._get_param("InstanceCount"):
        kept["TotalInstanceCount"] = kept["AvailableInstanceCount"] = int(count)
    for name in ("EndDateType", "EndDate"):
        if self._get_param(name):
            kept[name] = self._get_param(name)
    return ActionResult({"Return": True})


def cancel_capacity_reservation(self: Any) -> ActionResult:
    _store("reservation", self)[self._get_param("CapacityReservationId")]["State"] = "cancelled"
    return ActionResult({"Return": True})


def _budget(self: Any, name: str) -> Any:
    return self.backend.budgets[self._get_param("AccountId")][name]


def describe_subscribers_for_notification(self: Any) -> str:
    wanted = self._get_param("Notification")
    for notification in _budget(self, self._get_param("BudgetName")).notifications:
        keys = ("NotificationType", "ComparisonOperator", "Threshold")
        if all(notification.details.get(key) == wanted.get(key) for key in keys):
            return json.dumps({"Subscribers": notification.subscribers})
    return json.dumps({"Subscribers": []})


def update_budget(self: Any) -> str:
    new = self._get_param("NewBudget")
    _budget(self, new["BudgetName"]).budget.update(new)
    return "{}"


def _budget_tags(self: Any, arn: str) -> Json:
    return _store("budget-tags", self).setdefault(arn, {})


def list_tags_for_resource(self: Any) -> str:
    tags = _budget_tags(self, self._get_param("ResourceARN"))
    return json.dumps({"ResourceTags": [{"Key": k, "Value": v} for k, v in tags.items()]})


def tag_resource(self: Any) -> str:
    new = {tag["Key"]: tag["Value"] for tag in self._get_param("ResourceTags")}
    _budget_tags(self, self._get_param("ResourceARN")).update(new)
    return "{}"


def untag_resource(self: Any) -> str:
    for key in self._get_param("ResourceTagKeys"):
        _budget_tags(self, self._get_param("ResourceARN")).pop(key, None)
    return "{}"


for _class, _names in ADDED_ACTIONS.items():
    for _name in _names:
        setattr(_class, _name, globals()[_name])


def _remember_budget_tags(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def create_budget(self: Any) -> Any:
        answer = original(self)
        name = self._get_param("Budget")["BudgetName"]
        tags = {tag["Key"]: tag["Value"] for tag in self._get_param("ResourceTags") or []}
        _budget_tags(self, f"arn:aws:budgets::{self._get_param('AccountId')}:budget/{name}").update(tags)
        return answer

    return create_budget


def _own_tags_stay_out(original: Callable[..., None]) -> Callable[..., None]:
    """A launch template's own tags must not leak into its data, where they would show as a change for ever."""

    def init(self: Any, backend: Any, name: str, template_data: Json, description: str, tag_spec: Json) -> None:
        kept = [t for t in template_data.pop("TagSpecifications", []) if t.get("ResourceType") != "launch-template"]
        if kept:
            template_data["TagSpecifications"] = kept
        original(self, backend, name, template_data, description, tag_spec)

    return init


def _tls_condition_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    """moto denies on a Deny statement whose Condition is not met; AWS does not look at such a statement."""

    def is_action_permitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        condition = self._statement.get("Condition") or {}
        if str(condition.get("Bool", {}).get("aws:SecureTransport")).lower() != "false":
            return original(self, *args, **kwargs)
        if not Wire.plain_http:
            return PermissionResult.NEUTRAL
        bare = IAMPolicyStatement({key: value for key, value in self._statement.items() if key != "Condition"})
        return original(bare, *args, **kwargs)

    return is_action_permitted


def _description_of_group_rules_too(original: property) -> property:
    """A rule that names a group keeps its description with the group; moto looks beside the address range only."""
    return property(lambda self: original.fget(self) or self.source_group.get("Description"))


SecurityGroupRule.description = _description_of_group_rules_too(SecurityGroupRule.description)
BudgetsResponse.create_budget = _remember_budget_tags(BudgetsResponse.create_budget)
LaunchTemplate.__init__ = _own_tags_stay_out(LaunchTemplate.__init__)
IAMPolicyStatement.is_action_permitted = _tls_condition_counts(IAMPolicyStatement.is_action_permitted)


def reset(url: str) -> None:
    """Forget everything, the stores of the added actions too."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST"), timeout=120).read()
    _kept.clear()
    Wire.plain_http = False


@contextmanager
def serve() -> Iterator[str]:
    """Run until the block ends; gives the URL."""
    application = _refuse_what_is_missing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _refuse_what_is_missing(inner: Any) -> Any:
    """An action moto lacks answers 501 at once, in the service's own protocol; the provider retries a 500 for long."""
    inner.debug = True

    def outer(environ: Json, start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return inner(environ, start_response)
        except Exception as error:
            traceback.print_exc()
            content_type, body = _not_implemented(environ, f"moto: {type(error).__name__}: {error}")
            headers = [("content-type", content_type), ("x-amzn-errortype", "NotImplemented")]
            start_response("501 Not Implemented", [*headers, ("content-length", str(len(body)))])
            return [body]

    return outer


def _not_implemented(environ: Json, message: str) -> tuple[str, bytes]:
    scope = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].split("/")
    service = scope[3] if len(scope) > 3 else ""
    if "HTTP_X_AMZ_TARGET" in environ or "json" in environ.get("CONTENT_TYPE", ""):
        return "application/x-amz-json-1.1", json.dumps({"__type": "NotImplemented", "message": message}).encode()
    error = f"<Error><Code>NotImplemented</Code><Message>{escape(message)}</Message></Error>"
    if service == "ec2":
        error = f"<Response><Errors>{error}</Errors></Response>"
    elif service != "s3":
        error = f"<ErrorResponse>{error}</ErrorResponse>"
    return "text/xml", error.encode()
