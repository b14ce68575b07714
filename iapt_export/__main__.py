"""``python -m iapt_export``."""

from iapt_export.cli import main

main()
