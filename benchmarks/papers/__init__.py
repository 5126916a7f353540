"""The papers' experiments, reproduced small: `__main__` runs them; `exact` and `model` list them."""
