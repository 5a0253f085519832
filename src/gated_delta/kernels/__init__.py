"""What runs behind the operators: one module a backend or idea, imported when it first serves a call."""
