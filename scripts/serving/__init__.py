"""Puts adapters to work on a server of the private model: publish, prove, switch, roll back; and a server for here."""
