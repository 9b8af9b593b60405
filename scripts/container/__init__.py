"""What runs first on a GPU machine: it fetches, supervises the trainer, verifies, pushes and ends the machine."""
