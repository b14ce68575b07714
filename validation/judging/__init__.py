"""How far two sides may differ: metrics, limits, and the checks that apply them."""
