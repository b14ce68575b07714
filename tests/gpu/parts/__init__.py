"""The parts of `tests.gpu.first_light`, in order of worth. Each has ``TITLE``, ``LIMIT_S`` and ``run(work)``.

``WAITS_FOR`` names a part whose outcome it needs; ``IN_BACKGROUND`` lets the next parts begin beside it.
"""
