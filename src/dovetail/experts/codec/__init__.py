"""The codec of task experts: ternary values to bytes near the entropy limit, and back."""
