"""The ledger from a shell: export it, and see or carry out what retention takes."""
