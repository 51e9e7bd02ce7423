"""Compression methods, one module each; :mod:`effk.compress.registry` finds them here."""
