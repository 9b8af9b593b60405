"""A stand-in for the Terraform provider runpod/runpod 2.0.0: its documented schema over any REST v2 server."""
