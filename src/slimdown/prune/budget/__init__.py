"""How many channels each group keeps, so that the network costs what was asked."""
