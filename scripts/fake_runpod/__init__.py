"""A local Runpod: the control plane (REST v2) in memory, so that people can try Lorry without an account."""
