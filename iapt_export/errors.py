"""Errors that a user can fix. Standard library only, so that a deployment machine may import them."""

from trainers.errors import IaptError


class BundleError(IaptError):
    """A bundle's file is missing, altered, of a newer schema, or contradicts another."""


class ParityError(IaptError):
    """An export does not compute what PyTorch computes."""


class NotRunnableError(IaptError):
    """This machine lacks what a target needs: a runtime, a driver, a GPU. The files themselves may be fine."""


__all__ = ["BundleError", "IaptError", "NotRunnableError", "ParityError"]
