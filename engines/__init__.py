"""Bundle in, running program out: builders, runners and generation sessions.

A deployment machine needs NumPy, safetensors, tokenizers, jinja2 and one runtime; neither torch nor
transformers. From ``iapt_export`` only `iapt_export.contract` is imported here.

This module imports nothing heavy; import the submodule you need.
"""
