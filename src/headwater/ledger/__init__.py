"""What was spent, by which stage, and the budgets that stop a run."""

from headwater.ledger.ledger import Account, Ledger
from headwater.ledger.spending import COUNTERS, Spending

__all__ = ["COUNTERS", "Account", "Ledger", "Spending"]
