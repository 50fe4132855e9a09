"""Zeros among the weights, at random places or in N:M patterns; the shapes stay as they are."""

from slimdown.sparsify.layers import Weight as Weight
from slimdown.sparsify.layers import find_weights as find_weights
from slimdown.sparsify.pattern import Pattern as Pattern
from slimdown.sparsify.pattern import keep_largest as keep_largest
from slimdown.sparsify.stage import Sparsify as Sparsify
