"""The distiller: turns a window of the ledger into a policy, proves it, and proposes it."""
