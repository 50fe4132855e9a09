"""Removing channels, heads, hidden units and blocks: a `Prune` walks through these rooms in order.

depth ──► (capture) ──► importance ──► budget ──► surgery · verify ──► delivery ──► compensation

depth/         whole blocks that hardly change the output go first
importance/    how much each channel matters, from weights, images or gradients
budget/        how many channels each group keeps: MACs, parameters, bytes or measured latency
surgery.py     the graph without them, which is the oracle; verify.py proves it right
delivery/      back into the user's own module, or the graph where that cannot be
compensation/  the layers that read removed channels are fitted anew, without labels
plan.py        all of it as data, to do it again
"""

from slimdown.prune.groups import ChannelGroup as ChannelGroup
from slimdown.prune.groups import find_groups as find_groups
from slimdown.prune.stage import Prune as Prune
