"""How much an update gives away: at least (attacks), at most (bounds), with what confidence."""

from jaxinv.audit.auditing import Audit, Setting, audit
from jaxinv.audit.command import main
from jaxinv.audit.filtering import Decision, Limits, filter
from jaxinv.audit.games import Pool
from jaxinv.audit.verdict import verdict
from jaxinv.engine.likeness import Judge

__all__ = [
    "Audit",
    "Decision",
    "Judge",
    "Limits",
    "Pool",
    "Setting",
    "audit",
    "filter",
    "main",
    "verdict",
]
