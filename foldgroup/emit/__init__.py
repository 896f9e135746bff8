"""Emitters: a folded graph in the form that a runtime loads."""
