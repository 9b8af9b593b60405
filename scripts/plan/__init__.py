"""What a run takes: parameters, memory, time and money, and the choice of an offer. Pure and free of torch."""

from scripts.plan.choose import make_plan
from scripts.plan.explain import explain_text
from scripts.plan.text import plan_text

__all__ = ["explain_text", "make_plan", "plan_text"]
