"""The front door: one URL and one key behind which a web app finds the whole of Lorry. One file per protocol."""
