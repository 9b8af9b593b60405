"""The verbs: check, plan, render, launch, watch, store. No torch in this package."""
