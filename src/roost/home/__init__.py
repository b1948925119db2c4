"""HOME: who its user is in an image, and how a volume becomes it.

Runs alone, as `python -m roost.home`, beside an image's tree and a volume: on the node, in a helper container, in an
init container.  So it imports only roost.linux, roost.errors and roost.faults, and no package outside the standard
library.
"""
