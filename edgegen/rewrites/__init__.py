"""Exact graph rewrites: one file each; see edgegen/rewriting.py for who applies them."""
