"""The custom operators' names and versions: the only place where they are written. Imports nothing heavy."""

DOMAIN = "ai.iapt"
DOMAIN_VERSION = 1
RATIONAL = "Rational"
