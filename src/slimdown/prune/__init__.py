"""Removing channels, heads and hidden units."""

from slimdown.prune.groups import ChannelGroup as ChannelGroup
from slimdown.prune.groups import find_groups as find_groups
from slimdown.prune.stage import Prune as Prune
