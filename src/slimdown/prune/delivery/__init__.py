"""Handing a pruned network back: in the module of the user where that is provably the same."""
