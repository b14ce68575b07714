"""The one error class that means "the user can fix this"."""


class IaptError(Exception):
    """Bad input, a missing file, a wrong flag: the text says what was expected, what came and what to try.

    The command line prints it without a stack trace and exits non-zero. Anything else that is
    raised is a defect of this project and keeps its trace.
    """
