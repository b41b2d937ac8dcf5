"""`python -m jaxinv.audit`: what one update gives away, at least and at most.

    python -m jaxinv.audit --victim lenet_zhu-cifar10 --ids 17,23 --defense noise:1e-2
    python -m jaxinv.audit --victim lenet_zhu-cifar10 --ids 17 --update update.npz

The client's view: it knows its images, by their position in a data set. Writes `audit.html`, a page
with the verdict in plain words, and `audit.json`.
"""

import sys

from jaxinv.audit.command import main

if __name__ == "__main__":
    sys.exit(main())
