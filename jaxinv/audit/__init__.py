"""How much an update gives away: at least (attacks), at most (bounds), with what confidence."""

from jaxinv.audit.auditing import Audit, Decision, Limits, Setting, audit, filter, verdict
from jaxinv.audit.command import main
from jaxinv.audit.games import Pool

__all__ = ["Audit", "Decision", "Limits", "Pool", "Setting", "audit", "filter", "main", "verdict"]
